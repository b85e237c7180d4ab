"""Masks from text, masks as pictures, charts and the HTML report."""

from __future__ import annotations

import io
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core import data_masks, masks, rectangle_mask
from regard.report import charts, page
from regard.report.mask_text import _makers, parse_mask
from regard.report.pictures import mask_png, mask_tile
from regard.report.shares import shares

WORDS = {**vars(masks), **vars(data_masks), **vars(rectangle_mask), "torch": torch}

ATOMS = st.sampled_from(
    [
        "Causal()",
        "Full()",
        "SlidingWindow(3)",
        "SlidingWindow(left=2, right=1)",
        "Sinks(n=2)",
        "Prefix(4)",
        "Dilated(2, dilation=3)",
        "Strided(stride=3)",
        "Rectangles([(1, 4), (3, 6)], keys=((2, 9),))",
        "Rectangles(queries=[[0, 3]])",
        "Shifted(Causal(), -2)",
        "Documents(torch.tensor([0, 0, 0, 1, 1, 2, 2, -1, -1, -1, 3, 3]))",
        f"Keys(torch.tensor({[False] + 10 * [True] + [False]}))",
    ]
)
TEXTS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]} & {pair[1]})"),
        st.tuples(inner, inner).map(lambda pair: f"{pair[0]} | {pair[1]}"),
        inner.map(lambda text: f"~({text})"),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_parsing_agrees_with_python(text: str) -> None:
    expected = eval(text, WORDS)
    found = parse_mask(text)
    assert torch.equal(found.dense(12), expected.dense(12))
    assert repr(parse_mask(repr(found))) == repr(found)


def test_parsing_takes_bare_lists_and_heads() -> None:
    heads = parse_mask("PerHead([Causal(), Full() & ~Strided(2)])")
    assert heads.heads == 2
    assert heads.dense(4)[1].tolist() == [[(i - j) % 2 == 1 for j in range(4)] for i in range(4)]
    same = parse_mask("Documents([0, 0, 1])").dense(3)
    assert same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    dense = parse_mask("Dense([[True, False], [True, True]])").dense(2)
    assert dense.tolist() == [[True, False], [True, True]]


# Each mask with what it cannot do without.
LEAST = {
    "Clear": "height=4, width=4, radius=1.5",
    "Dense": "tensor=[[True, False], [True, True]]",
    "Dilated": "window=2, dilation=2",
    "Documents": "ids=[0, 1]",
    "Halo": "grid=[4, 4], block=2, halo=1",
    "Keys": "valid=[True]",
    "Neighborhood": "grid=[4, 4], window=[3, 3]",
    "PerHead": "masks=[Causal()]",
    "Prefix": "n=2",
    "Radial": "frames=2, tokens_per_frame=4",
    "RadialBlocks": "frames=2, tokens_per_frame=128",
    "S2": "query_heads=4, vert_stride=2",
    "Shifted": "mask=Causal(), by=1",
    "Sinks": "n=1",
    "SlidingWindow": "left=1",
    "Strided": "stride=2",
}


@pytest.mark.parametrize("name", sorted(_makers()))
def test_usage_and_repr_are_read_back(name: str) -> None:
    mask = parse_mask(f"{name}({LEAST.get(name, '')})")
    assert repr(parse_mask(repr(mask))) == repr(mask)
    with pytest.raises(ValueError, match="needs its brackets: ") as said:
        parse_mask(name)
    _, _, usage = str(said.value).partition("needs its brackets: ")
    inside = usage.removeprefix(f"{name}(").removesuffix(")")
    defaults = [part for part in inside.split(", ") if "=" in part]
    given = LEAST.get(name, "")
    wanted = [part for part in defaults if part.partition("=")[0] + "=" not in given]
    same = parse_mask(f"{name}({', '.join([given, *wanted] if given else wanted)})")
    assert repr(same) == repr(mask)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Rectangles('x')", r"is not allowed here"),
        ("Clear('x', 4, 1)", r"not allowed here"),
        ("Clear([1], 4, 1)", r"Clear: height cannot be \[1\]"),
        ("Halo(3, 1, 1)", r"'Halo\(3, 1, 1\)' cannot be made: "),
        ("S2(4, vert_positions='nowhere')", r"vert_positions must be"),
        ("Sinks(1, 2)", r"too many positional arguments; it is Sinks\(n\)"),
        ("MaskGroup()", r"there is no MaskGroup"),
        ("Causl()", r"there is no Causl\. Did you mean Causal\? There are: Causal, Clear, "),
        ("slidingwindow(3)", r"Did you mean SlidingWindow\?"),
        ("Xyzzy()", r"there is no Xyzzy\. There are: "),
        ("Predicate(print)", r"there is no Predicate"),
        ("Causal", r"Causal needs its brackets: Causal\(\)"),
        ("SlidingWindow", r"SlidingWindow\(left, right=0\)"),
        ("Causal() + Full()", r"combine with & \| ~ only"),
        ("Causal() and Full()", r"'Causal\(\) and Full\(\)' is not allowed here"),
        ("-Causal()", r"combine with & \| ~ only"),
        ("Causal() & 5", r"expected a mask beside & \| ~, got '5'"),
        ("5", r"'5' is no mask"),
        ("", r"cannot read ''"),
        ("(((", r"near column"),
        ("SlidingWindow()", r"missing a required argument: 'left'; it is SlidingWindow\(left, ri"),
        ("SlidingWindow(1, wide=2)", r"unexpected keyword argument 'wide'"),
        ("SlidingWindow(**{})", r"\*\* is not allowed"),
        ("SlidingWindow(1.5)", r"'1\.5' is not allowed here"),
        ("Sinks('x')", r"is not allowed here"),
        ("PerHead(Causal())", r"PerHead: masks cannot be Causal\(\)"),
        ("Shifted(3, 1)", r"Shifted: mask cannot be 3"),
        ("Halo((8, 8), 2, halo=True)", r"Halo: halo cannot be True"),
        ("Halo((8, 8), 2, 1, padded=[])", r"Halo: padded cannot be \[\]"),
        ("Rectangles([Causal()])", r"Rectangles: queries must be ranges .*, got \[Causal\(\)\]"),
        ("Documents([[1], [2, 3]])", r"Documents: expected lists of numbers"),
        ("().__class__", r"is not allowed here"),
        ("torch.load('x')", r"'torch\.load' is not the name of a mask"),
        ("__import__('os').system('true')", r"is not the name of a mask"),
        ("[Causal() for x in (1,)]", r"is not allowed here"),
        ("~" * 9000 + "Causal()", r"nested too deeply"),
        ("Causal() | " * 9000, r"has 99000 characters, at most 20000"),
    ],
)
def test_what_is_no_mask(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mask(text)


def positions(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(m - n, m)[:, None], torch.arange(m)[None, :]


@pytest.mark.parametrize(("n", "m"), [(64, 64), (128, 256), (1, 64), (32, 64)])
@pytest.mark.parametrize("closed", [True, False])
def test_shares_are_the_means_of_the_cells(n: int, m: int, closed: bool) -> None:
    mask = parse_mask("Causal() & (SlidingWindow(20) | Sinks(3))")
    if not closed:
        mask = masks.Predicate(mask.allows)
    i, j = positions(n, m)
    dense = ((j <= i) & ((i - j <= 20) | (j < 3))).double()
    rows, cols = min(n, 16), min(m, 16)
    expected = dense.view(rows, n // rows, cols, m // cols).mean((1, 3))
    assert torch.allclose(shares(mask, n, m, cells=16).double(), expected)


@pytest.mark.parametrize(("n", "m"), [(37, 50), (50, 37), (7, 7)])
def test_shares_of_uneven_cells_keep_the_density(n: int, m: int) -> None:
    i, j = positions(n, m)
    dense = (((i - j) % 3 == 0) & (j <= i)).double()
    found = shares(parse_mask("Strided(3) & Causal()"), n, m, cells=10)
    rows, cols = (torch.arange(min(x, 10) + 1) * x // min(x, 10) for x in (n, m))
    areas = rows.diff()[:, None] * cols.diff()[None, :]
    assert (found * areas).sum().item() == pytest.approx(dense.sum().item(), rel=1e-5)


def test_shares_of_one_head() -> None:
    mask = parse_mask("PerHead([Causal(), Full()])")
    assert shares(mask, 8, head=0).sum() == 36
    assert shares(mask, 8, head=1).sum() == 64


def test_shares_refuse_what_nobody_waits_for() -> None:
    with pytest.raises(ValueError, match="got 1000000 x 1000000"):
        shares(masks.Causal(), 1_000_000)


def pixels(png: bytes) -> torch.Tensor:
    from matplotlib.image import imread

    return torch.from_numpy(imread(io.BytesIO(png)).copy())


def test_a_picture_shows_the_mask(tmp_path: Any) -> None:
    path = tmp_path / "mask.png"
    png = mask_png(masks.Causal(), 32, path=path)
    assert path.read_bytes() == png
    image = pixels(png)[..., :3]
    high, wide = image.shape[:2]
    # Far from the labels: allowed below the diagonal, not above it.
    assert image[int(high * 0.7), int(wide * 0.35)].tolist() == pytest.approx(
        [0x25 / 255, 0x63 / 255, 0xA8 / 255], abs=0.01
    )
    assert image[int(high * 0.3), int(wide * 0.8)].min() > 0.9
    assert mask_png(masks.Causal(), 32) == png


def test_a_picture_of_heads_has_a_panel_each() -> None:
    one = pixels(mask_png(masks.Causal(), 16)).shape
    five = pixels(mask_png(data_masks.PerHead([masks.Causal()] * 5), 16)).shape
    assert five[1] > one[1]
    many = pixels(mask_png(data_masks.PerHead([masks.Causal()] * 40), 16)).shape
    assert many[0] < 2500


def test_a_title_is_not_mathematics() -> None:
    assert mask_png(masks.Full(), 4, title="$\\frac{").startswith(b"\x89PNG")


def test_a_stencil_is_opaque_where_the_mask_allows() -> None:
    image = pixels(mask_tile(masks.Causal(), 8))
    assert image.shape == (8, 8, 4)
    assert torch.equal(image[..., 3] > 0.5, torch.ones(8, 8).tril().bool())
    both = pixels(mask_tile(parse_mask("PerHead([Full(), ~Full()])"), 4))
    assert both[..., 3].mean().item() == pytest.approx(math.sqrt(0.5), abs=0.01)


def tags(svg: str, name: str) -> list[dict[str, str]]:
    return [dict(node.attrib) for node in ET.fromstring(svg).iter(name)]


def test_scatter_places_points_in_order() -> None:
    svg = charts.scatter([("a", 1.0, 10.0), ("b", 2.0, 12.0), ("c", 3.0, 11.0)], "x", "y")
    dots = tags(svg, "circle")
    across, up = ([float(dot[key]) for dot in dots] for key in ("cx", "cy"))
    assert across == sorted(across)
    assert up[0] > up[2] > up[1]
    assert across[2] - across[1] == pytest.approx(across[1] - across[0], abs=0.2)
    assert [dot["fill"] for dot in dots] == ["var(--c0)", "var(--c1)", "var(--c2)"]


def test_scatter_keeps_what_blew_up_at_the_edge() -> None:
    points = [("a", 1.0, 10.0), ("bad", 2.0, 5000.0), ("lost", 1.5, math.nan)]
    svg = charts.scatter(points, "x", "y", ("a attention", 10.0))
    assert len(tags(svg, "circle")) == 1
    assert len(tags(svg, "polygon")) == 1
    assert "bad: 5,000" in svg and "lost" not in svg and "a attention" in svg


def test_names_do_not_cover_each_other() -> None:
    svg = charts.scatter([(f"method {i}", 1.0, 10.0) for i in range(4)], "x", "y")
    heights = [float(t["y"]) for t in tags(svg, "text") if t.get("class") == "name"]
    assert len(heights) == 4
    assert all(abs(a - b) >= 14 for a in heights for b in heights if a is not b)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.07), (17.3, 21.9), (0, 54321), (-2, 2)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = charts.Axis(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:.6g}".strip("-0.").replace(".", "")) <= 5 for tick in ticks)


@pytest.mark.parametrize(
    "svg",
    [
        charts.scatter([("<b>&", 0.0, 0.0)], "<i>", "a & b"),
        charts.curves([("<b>&", [1.0, math.nan, 3.0])], ["0", "<1", "2+"], "<i>", "&"),
        charts.heat([[0.0, 0.5], [1.0, math.nan]], 1.0, "<b>&"),
    ],
)
def test_charts_are_well_formed_and_escaped(svg: str) -> None:
    assert ET.fromstring(svg).tag == "svg"
    assert "<b>" not in svg and "<i>" not in svg


def test_charts_of_nothing() -> None:
    for found in (
        charts.scatter([("a", math.nan, 1.0)], "x", "y"),
        charts.curves([], [], "x", "y"),
        charts.heat([], 1.0, "x"),
    ):
        assert "nothing to draw" in found


EVIL = "<script>alert(1)</script>\"'&.txt"


def fake() -> dict[str, Any]:
    rng = random.Random(0)
    shown = {
        "full": ("Causal()", 17.31, 0.0, 0.50),
        "window": ("Causal() & SlidingWindow(left=15, right=0)", 1612.4, 92.1, 0.22),
        "streaming": (
            "Causal() & (SlidingWindow(left=15, right=0) | Sinks(n=4))",
            17.7,
            0.02,
            0.23,
        ),
        "chosen": (f"TopBlocks({EVIL})", 17.4, 0.005, 0.13),
    }
    rows = [
        {
            "method": method,
            "mask": mask,
            "ppl": ppl,
            "ppl_change": worse,
            "agreement": 0.941,
            "needle": {"0.1": method == "full", "0.9": True},
            "density": density,
            "bound": 0.5 / density,
            "prefill_s": 9.25,
            "prefill_tok_s": 7.0,
            "attention_s": 2.0,
            "choosing_s": 0.5,
            "tasks": {"passkey": 1.0, EVIL: 0.25},
            "attention_speedup": 1.9,
            "decode_tok_s": None if method == "chosen" else 21.3,
            "peak_mb": 1911.2,
        }
        for method, (mask, ppl, worse, density) in shown.items()
    ]
    attention = {
        method: {
            "distance_edges": [0, 1, 2, 4, 8],
            "mass_by_distance": [0.4, 0.3, 0.2, 0.1],
            "sinks": [[rng.random() for _ in range(3)] for _ in range(2)],
        }
        for method in ("full", "streaming")
    }
    return {
        "model": "smollm2",
        "text": {"name": EVIL, "tokens": 64},
        "length": 64,
        "unpatched_ppl": 17.3125,
        "machine": {"system": "Linux", "cores": 2, "gpus": [], "note": None},
        "rows": rows,
        "attention": attention,
    }


class Reader(HTMLParser):
    """Collects the tags and the visible text, and checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += " " + data.strip()


def test_the_page_is_whole_and_self_contained() -> None:
    html = page.render(fake())
    seen = Reader(html)
    assert seen.links == []
    assert set(re.findall(r"url\((.{11})", html)) == {"data:image/"}
    assert "http" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html
    # Two plots, one set of curves, two heat maps; three masks and one selector without a mask.
    assert seen.names.count("svg") == 5
    assert html.count("data:image/png;base64,") == 3
    assert "chosen from the content" in seen.text


def test_what_the_user_typed_is_escaped() -> None:
    html = page.render(fake())
    seen = Reader(html)
    assert "script" not in seen.names
    assert "<script" not in html
    assert EVIL in seen.text.replace("  ", " ")
    assert f"TopBlocks({EVIL})" in seen.text


def test_the_page_shows_every_figure() -> None:
    words = Reader(page.render(fake())).text
    for figure in ("17.31", "1,612", "×93.1", "+2.0%", "94.1%", "9.25", "21.3", "1,911", "17.3125"):
        assert figure in words, figure
    for name in ("full", "window", "streaming", "chosen"):
        assert name in words
    assert "system: Linux · cores: 2" in words


def test_the_page_without_attention_and_measurements() -> None:
    result = fake()
    result["attention"] = {}
    for row in result["rows"]:
        row.update(dict.fromkeys(set(row) - {"method", "mask", "needle"}), needle={})
    words = Reader(page.render(result)).text
    assert "Where the attention went" not in words
    assert "nothing to draw" in words


def test_a_page_is_written(tmp_path: Any) -> None:
    path = page.write(fake(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_findings_say_what_holds_and_what_does_not() -> None:
    assert page.findings(fake()["rows"]) == [
        "chosen computes 26% of the dense pairs for 0.5% more perplexity.",
        "window does not hold: 93.1 times the perplexity.",
    ]
    assert page.findings(fake()["rows"][:1]) == []


def test_figures() -> None:
    assert [page.number(x) for x in (None, math.nan, math.inf, 1234.5, 2.345)] == [
        "–",
        "–",
        "∞",
        "1,234",
        "2.35",
    ]
    assert [page.change(x) for x in (0.0, 0.0237, -0.01, 9.0, None)] == [
        "0 %",
        "+2.4%",
        "-1.0%",
        "×10.0",
        "–",
    ]
    assert [page.percent(x) for x in (0.5, None)] == ["50.0%", "–"]


def test_distance_bins() -> None:
    def bins(edges: list[int], count: int) -> list[str]:
        return page._bins({"distance_edges": edges, "mass_by_distance": [0.0] * count})

    assert bins([0, 1, 2, 4, 8], 4) == ["0", "1", "2–3", "4–7"]
    assert bins([0, 1, 4], 3) == ["0", "1–3", "4+"]
    with pytest.raises(ValueError, match="5 distance edges do not fit 2 bins"):
        bins([0, 1, 2, 3, 4], 2)
