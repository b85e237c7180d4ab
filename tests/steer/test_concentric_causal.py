"""Concentric causal attention against its layout written out, and its invariance in models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import concentric_causal as benchmark
from tests.golden import adapter, load
from tests.models.tiny import ids, make
from tests.steer import moving
from tests.steer.tiny_vlm import llava, qwen2_vl

import regard
from regard.models import Spans, capture
from regard.steer.concentric_causal import (
    ConcentricCausal,
    ConcentricMask,
    cca_layout,
    concentric_positions,
)

DATA = Path(__file__).parents[1] / "golden" / "data"
IMAGE = Spans.of(14, image=(2, 6), text=(9, 13))
WIDE = Spans.of(20, image=(2, 18), text=(18, 20))


@pytest.fixture(autouse=True)
def a_square_image(monkeypatch):
    monkeypatch.setattr(moving, "SPANS", IMAGE)


def written_out(n, start, side):
    """Cell by cell, by peeling rings."""
    ring = {}
    for i in range(side):
        for j in range(side):
            inner = 0
            while not (i in (inner, side - 1 - inner) or j in (inner, side - 1 - inner)):
                inner += 1
            ring[start + i * side + j] = inner
    positions, following = [], start + side // 2
    for c in range(n):
        if c < start:
            positions.append(c)
        elif c in ring:
            positions.append(start + ring[c])
        else:
            positions.append(following)
            following += 1
    allow = [
        [ring[j] <= ring[i] if i in ring and j in ring else j <= i for j in range(n)]
        for i in range(n)
    ]
    return torch.tensor(positions), torch.tensor(allow)


@pytest.mark.parametrize(("n", "start", "side"), [(4, 0, 2), (9, 2, 2), (30, 5, 4), (70, 3, 8)])
def test_is_the_layout_written_out(n, start, side):
    positions, allow = cca_layout(n, (start, start + side**2), side)
    want = written_out(n, start, side)
    assert torch.equal(positions, want[0]) and torch.equal(allow, want[1])
    mask = ConcentricMask(((start, start + side**2),))
    assert torch.equal(mask.layout(n, n, 8).dense()[0, 0], allow)
    assert positions[-1] == n - 1 - side**2 + side // 2 or start + side**2 == n


def test_limits():
    assert concentric_positions(24).max() == 11
    positions, allow = cca_layout(6, (2, 2))
    assert torch.equal(positions, torch.arange(6)) and torch.equal(allow, regard.Causal().dense(6))
    # Two images: each is laid out by itself, and the second one sees the first whole.
    mask = ConcentricMask(((1, 5), (6, 22))).dense(24)
    assert mask[6:22, 1:5].all() and not mask[1:5, 5:].any() and mask[1:5, 1:5].all()
    assert torch.equal(mask[6:22, 6:22], cca_layout(16, (0, 16))[1])


@torch.no_grad()
def test_in_a_model_it_is_the_layout():
    """The same as handing the model the position ids and the mask."""
    for kind in ("llama", "gpt_neox"):
        model, x = make(kind), ids(2, 20)
        positions, allow = cca_layout(20, (2, 18))
        bias = torch.zeros(2, 1, 20, 20).masked_fill(~allow, torch.finfo(torch.float32).min)
        want = model(x, position_ids=positions[None], attention_mask=bias).logits
        with regard.patch(model, ConcentricCausal(), spans=WIDE):
            torch.testing.assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_of_one_ring_have_no_order():
    model, x = make("llama"), ids(2, 20)
    order = torch.arange(20)
    ring = concentric_positions(4).flatten()
    generator = torch.Generator().manual_seed(3)
    for r in (0, 1):
        cells = 2 + (ring == r).nonzero().flatten()
        order[cells] = cells[torch.randperm(len(cells), generator=generator)]
    assert not torch.equal(x, x[:, order])
    with regard.patch(model, ConcentricCausal(), spans=WIDE):
        before, after = model(x).logits, model(x[:, order]).logits
    torch.testing.assert_close(after, before[:, order], atol=1e-5, rtol=1e-5)
    changed = (model(x).logits - model(x[:, order]).logits)[:, 18:]
    assert changed.abs().max() > 1e-2


@torch.no_grad()
def test_only_its_rows_and_columns_change():
    model, x = make("llama"), ids(2, 18)
    with regard.patch(model, ConcentricCausal(), spans=IMAGE):
        weights = capture(model, x, "weights", layers=[0])["weights", 0]
    allow = cca_layout(18, (2, 6))[1]
    assert not weights[:, :, ~allow].any() and (weights[:, :, allow] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 18), atol=1e-5, rtol=0)
    # Nothing of the image is read before it.
    plain = capture(model, x, "weights", layers=[0])["weights", 0]
    torch.testing.assert_close(weights[:, :, :2], plain[:, :, :2])


def test_moving_checks():
    method = ConcentricCausal()
    moving.changes_something(method)
    moving.cached_is_uncached(method)
    moving.padding_does_not_matter(ConcentricCausal)
    moving.leaves_the_model_as_it_was(method)
    moving.beams_are_those_of_a_slow_search(method)
    moving.needs_its_span(method, "image")


def test_an_empty_image_changes_nothing(monkeypatch):
    monkeypatch.setattr(moving, "SPANS", Spans.of(14, image=[], text=(9, 13)))
    moving.changes_nothing(ConcentricCausal())


@torch.no_grad()
def test_a_prompt_in_pieces_is_cut_around_the_image():
    model, x = make("llama"), ids(1, 18)
    with regard.patch(model, ConcentricCausal(), spans=IMAGE):
        whole = model(x).logits
        cache, parts = None, []
        for part in (x[:, :2], x[:, 2:8], x[:, 8:]):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **moving.TOLERANCE)
        with pytest.raises(ValueError, match="cuts the image"):
            model(x[:, :4])


@torch.no_grad()
def test_on_images():
    model, inputs, spans = llava()
    plain = model(**inputs).logits
    with regard.patch(model, ConcentricCausal(), spans=replace(spans, ranges={"image": ()})):
        torch.testing.assert_close(model(**inputs).logits, plain)
    with regard.patch(model, ConcentricCausal(), spans=spans):
        steered = model(**inputs).logits
        tokens = model.generate(**inputs, **moving.GREEDY)
    assert (steered - plain).abs().max() > 1e-3
    # The end of the text is not to come yet.
    assert tokens[0, 23] == steered[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()
    assert torch.equal(model(**inputs).logits, plain)
    model, inputs, spans = qwen2_vl()
    plain = model(**inputs).logits
    with (
        regard.patch(model, ConcentricCausal(), spans=spans),
        pytest.raises(ValueError, match="differ between axes: rings are defined for one axis"),
    ):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_text_of_a_model_with_three_axes_is_laid_out_on_all():
    """As if the model were handed rings and mask, whether it is given positions (generate) or not."""
    model, x = qwen2_vl()[0], ids(2, 20) % 50 + 3
    positions, allow = cca_layout(20, (2, 18))
    bias = torch.zeros(2, 1, 20, 20).masked_fill(~allow, torch.finfo(torch.float32).min)
    want = model(x, position_ids=positions.expand(3, 2, -1), attention_mask=bias).logits
    assert (model(x).logits - want).abs().max() > 1e-2
    with regard.patch(model, ConcentricCausal(), spans=WIDE):
        torch.testing.assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)
        long = {"output_logits": True, "return_dict_in_generate": True, **moving.GREEDY}
        first = model.generate(x, **long).logits[0]
    torch.testing.assert_close(first, want[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_it_refuses():
    model, x = make("qwen3"), ids(1, 18)
    with (
        regard.patch(model, ConcentricCausal(), spans=IMAGE),
        pytest.raises(ValueError, match="expected a causal layer"),
    ):
        model(x)
    model = make("llama")
    for image in ((2, 7), (2, 11)):
        with (
            regard.patch(model, ConcentricCausal(), spans=Spans.of(14, image=image)),
            pytest.raises(ValueError, match="square of an even number"),
        ):
            model(x)
    with pytest.raises(ValueError, match="side must be even"):
        concentric_positions(5)


def test_golden_replays():
    case = load(DATA / "concentric-causal.npz")
    got = adapter(DATA / "concentric-causal.npz").replay(case)
    assert set(got) == {"grid", "grid24", "position_ids", "mask"}
    assert all((value == case[name]).all() for name, value in got.items())


def test_the_benchmark_shows_the_claim():
    rows = {r["name"]: r["note"] for r in benchmark.invariance(sides=(4, 6))}
    assert any("distance" in name for name in rows)
    assert "N^1.99" in benchmark.growth()[0]["note"]
