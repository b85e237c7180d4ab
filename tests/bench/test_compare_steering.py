"""`regard compare` with steering methods: names, spans, what is measured, what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

import regard
from regard.bench import compare, steer_names
from regard.bench.method_text import called, commas, leading, literal
from regard.bench.methods import method
from regard.bench.quality import prefill
from regard.bench.steer_spans import looks_ahead, of_prompt, of_text, told
from regard.core.masks import Causal, Full, SlidingWindow
from regard.models import Edit, Method, Spans, fork
from regard.report import page
from regard.steer.act import ACT
from regard.steer.gift import GIFT
from regard.steer.vhr import VHR
from tests.models.tiny import make

N = 320
# With fewer tokens than the paper's, and random weights, sinks are small.
ACTING = "act(per_length=True, threshold=2)"
SINKS = ACT(per_length=True, threshold=2)


class Letters:
    """A tokenizer of one token a sign."""

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [1 + ord(sign) % 127 for sign in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


@pytest.fixture(scope="module")
def model():
    return make("llama", vocab_size=128, max_position_embeddings=2048)


@pytest.fixture
def tiny(monkeypatch, model):
    monkeypatch.setattr(compare, "load", lambda name: (model, Letters()))
    return model


@pytest.fixture(scope="module")
def result(model):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(compare, "load", lambda name: (model, Letters()))
        return compare.run(
            length=N,
            methods=(
                "window:40",
                "vhr",
                "vhr(alpha=1.0)",
                "gift(alpha=3.0)",
                ACTING,
                "act(causal=True, per_length=True, threshold=2)",
                "mma",
            ),
            tasks=False,
        )


def sample(model) -> torch.Tensor:
    from regard.data import sample_text

    return torch.tensor([Letters()(sample_text())["input_ids"][:N]])


def test_text_of_methods():
    assert commas("full, gift(alpha=3.0, layers=(1, 2)),a[1,2],, ") == [
        "full",
        "gift(alpha=3.0, layers=(1, 2))",
        "a[1,2]",
    ]
    assert called("gift(alpha=3.0, layers=(1, 2))") == ("gift", ["alpha=3.0", "layers=(1, 2)"])
    assert called("vhr") == ("vhr", []) and called("vhr()") == ("vhr", [])
    assert leading("gift (alpha=3.0)") == "gift"
    assert leading("dual-stream-modulation(a=1)") == "dual-stream-modulation"
    assert leading("~Causal()") == leading("(Causal() | Full())") == leading("vhr") == ""
    assert literal("(1, 0.5)") == (1, 0.5) and literal("'1'") == "1" and literal("None") is None
    for text in ("mean", "{[]: 1}", "1 +", "print(1)", "a.b", ""):
        assert literal(text) == text


def test_steering_methods_by_name():
    found = method("gift(alpha=3.0,layers=(1, 2))", 512)
    assert found.name == "gift(alpha=3.0, layers=(1, 2))" and found.steers
    assert isinstance(found.how, GIFT)
    assert (found.how.alpha, found.how.layers) == (3.0, (1, 2))
    assert method("vhr", 512).entry == "regard.steer.vhr:VHR"
    assert method(VHR(alpha=3.0), 512).steers
    for how in ("window:16", "hip", Causal() & SlidingWindow(3)):
        assert not method(how, 512).steers


def test_a_calibrated_method_reads_its_file(tmp_path):
    heads = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    VHR(alpha=1.5, heads=heads).save(tmp_path / "v.safetensors")
    found = method(f"vhr(file={tmp_path / 'v.safetensors'}, alpha=3.0)", 512)
    assert isinstance(found.how, VHR) and found.how.alpha == 3.0
    assert torch.equal(found.how.heads, heads)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vrh", r"compare: unknown method 'vrh'; did you mean 'vhr'\?"),
        ("gfit(alpha=3.0)", r"did you mean 'gift'\?"),
        ("windw", r"did you mean 'window'\?"),
        ("xyzzy", r"known are full, .*hip.*moa.*vista"),
        ("gift(alhpa=3.0)", "compare: gift has no setting 'alhpa'; it has alpha, setup"),
        ("gift(alpha)", r"compare: gift in brackets takes KEY=VALUE, got 'alpha'"),
        ("gift(=3)", "takes KEY=VALUE"),
        ("gift(alpha=3.0", "closes at the end"),
        ("gift(setup=14)", r"compare: gift cannot be made with setup=14: .*int"),
        ("vhr(alpha=x)", "compare: vhr cannot be made with alpha='x'"),
        ("vhr(alpha=-1)", "alpha must be >= 0, got -1"),
        ("vhr(file=/nowhere/v)", "reads a file, but there is no /nowhere/v"),
        (f"vhr(file={__file__})", "cannot be read as safetensors"),
        ("var", r"compare: var needs dims=VALUE or file=PATH"),
        ("vhr:2", r"write settings in brackets, vhr\(KEY=VALUE\)"),
        ("vhr@x.safetensors", r"vhr\(file=x\.safetensors\)"),
        ("window(512)", "a number of window stands after a colon"),
        ("lofit", "made for one loaded model"),
        ("carve", r"compare: carve is not one patch but regard\.steer\.carve:look \("),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(text, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        compare.run(model="/nowhere", methods=(text,))
    assert "\n" not in str(error.value)


def test_the_rule_of_the_parts():
    assert of_prompt(100) == Spans.of(100, image=(0, 75), text=(75, 100))
    assert of_text(200) == of_prompt(100)
    assert told(of_text(200), 200) == {
        "image": [[0, 75]],
        "text": [[75, 100]],
        "generated": [[100, 200]],
    }


@pytest.mark.parametrize(
    ("name", "how"),
    [("full", None), ("vhr", VHR()), ("gift(alpha=3.0)", GIFT(alpha=3.0)), (ACTING, SINKS)],
)
@torch.no_grad()
def test_perplexity_is_that_of_the_second_half(model, result, name, how):
    ids = sample(model)
    row = next(row for row in result["rows"] if row["method"] == name)
    if how is None:
        logits = model(ids).logits
        assert result["unpatched_ppl"] == pytest.approx(row["ppl"], rel=1e-5)
    else:
        spans = Spans.of(160, image=(0, 120), text=(120, 160))
        with regard.patch(model, how, spans=spans):
            logits = model(ids).logits
        assert row["spans"] == {"image": [[0, 120]], "text": [[120, 160]], "generated": [[160, N]]}
    loss = torch.nn.functional.cross_entropy(logits[0, 159:-1], ids[0, 160:])
    assert row["ppl"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert result["scored"] == [160, N]


def test_what_is_told_of_each(result):
    rows = {row["method"]: row for row in result["rows"]}
    full, same = rows["full"], rows["vhr(alpha=1.0)"]
    assert full["spans"] is full["ahead"] is rows["window:40"]["spans"] is None
    assert same["ppl"] == pytest.approx(full["ppl"], rel=1e-5) and same["agreement"] == 1
    assert rows["vhr"]["ppl"] != full["ppl"]
    # Sinks that are judged by all rows are judged by later ones; row by row they are not.
    assert {name for name, row in rows.items() if row["ahead"]} == {ACTING}
    for name in ("vhr", "gift(alpha=3.0)", ACTING):
        assert rows[name]["density"] == rows[name]["bound"] == 1.0, name
    # 120 rows of the image read forty keys of the question besides.
    assert rows["mma"]["density"] == pytest.approx(1 + 120 * 40 / (320 * 321 / 2))
    # Edited weights are no softmax of which statistics could be taken.
    assert set(result["attention"]) == {"full", "window:40", "vhr", "vhr(alpha=1.0)", "mma"}
    json.dumps(result, allow_nan=False)


def test_table_and_report(result):
    console = Console(width=240, record=True)
    console.print(compare.table(result))
    said = " ".join(console.export_text().split())
    assert "gift(alpha=3.0)" in said and "second half" in said
    assert "first half of the text is the prompt" in said
    row = next(row for row in result["rows"] if row["method"] == ACTING)
    assert f"{row['ppl']:.3f}*" in said and "depend on later tokens" in said
    html = " ".join(page.render(result).split())
    assert "gift(alpha=3.0)" in html and "steers the model" in html
    assert "first half of the text is the prompt" in html and "depend on later tokens" in html
    # A method that reads more pairs than dense attention does not make that a sparse one.
    assert not any(words.startswith("full") for words in page.findings(result["rows"]))


def test_without_steering_everything_is_as_it_was(tiny):
    result = compare.run(length=N, methods=("window:40",))
    assert result["scored"] == [1, N] and result["spans_rule"] is None
    ids = sample(tiny)
    with torch.no_grad():
        loss = tiny(ids, labels=ids).loss
    assert result["rows"][0]["ppl"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert "first half" not in page.render(result)


def test_tasks_and_other_spans_reach_the_method(tiny, monkeypatch):
    seen = set()

    class Spy(VHR):
        def _choose(self, weights, site):
            seen.add((site.spans.length, tuple(site.spans.ranges.items()), site.call.m))
            return super()._choose(weights, site)

    result = compare.run(length=1600, methods=(Spy(alpha=1.5),), tasks=True)
    assert result["rows"][1]["tasks"].keys() == result["rows"][0]["tasks"].keys()
    # The trial, the text (twice more: turned round, and where attention went), haystack and tasks.
    lengths = {length: m for length, _, m in seen}
    assert lengths.pop(32) == 64 and lengths.pop(800) == 1600
    assert len(lengths) >= 1 and all(length == m <= 1552 for length, m in lengths.items())
    for length, parts, _ in seen:
        image = 3 * length // 4
        assert parts == (("image", ((0, image),)), ("text", ((image, length),)))


class Peeking(Method):
    """Sees what stands behind it."""

    def mask(self, pattern, call):
        return Full()


class Head(Method):
    """Edits the output head's logits."""

    def edits(self):
        return [Edit("lm_logits", lambda x, site: x)]


@torch.no_grad()
def test_looking_ahead_is_found(model):
    ids = sample(model)
    for how, expected in ((Peeking(), True), (VHR(), False), (Head(), False)):
        with regard.patch(model, how, spans=of_text(N)):
            states, _ = prefill(model, ids)
        assert looks_ahead(model, how, ids, states) == expected, how


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("pine", "compare: pine cannot run on LlamaForCausalLM with .* no span 'documents'"),
        ("concentric-causal", "compare: concentric-causal cannot run .* square of an even number"),
        (
            "var(dims=(4000,))",
            r"compare: var\(dims=\(4000,\)\) cannot run .* must lie in \[0, 32\)",
        ),
        ("act(heads=[(9, 0)])", r"compare: act\(.* layers \[9\], but the model has 4"),
    ],
)
def test_a_method_that_cannot_run_here_is_named_before_anything_is_measured(tiny, how, words):
    said = []
    with pytest.raises(ValueError, match=words):
        compare.run(length=N, methods=(how,), progress=lambda *step: said.append(step[0]))
    assert said == ["loading smollm2"]


def test_edits_of_the_output_head_are_refused():
    with pytest.raises(ValueError, match=r"edits the logits of the output head \(lm_logits\)"):
        compare.run(model="/nowhere", methods=(Head(),))


@pytest.mark.parametrize("how", [VHR(alpha=3.0), GIFT(alpha=5.0), SINKS], ids=repr)
@torch.no_grad()
def test_a_fork_carries_what_is_kept_with_the_cache(model, how):
    """Two forks and the cache itself go on alike, each as if the others were not there."""
    ids = sample(model)[:, :80]
    more = torch.tensor([[5, 6, 7]])

    def answer(cache):
        first = model(more, past_key_values=cache, use_cache=True).logits[0, -1]
        again = model(more[:, :1], past_key_values=cache, use_cache=True).logits[0, -1]
        return torch.stack([first, again])

    with regard.patch(model, how, spans=of_prompt(80)):
        _, alone = prefill(model, ids)
        expected = answer(alone)
        _, cache = prefill(model, ids)
        found = [answer(fork(model, cache)), answer(fork(model, cache)), answer(cache)]
    _, plain = prefill(model, ids)
    assert not torch.allclose(answer(plain), expected, atol=1e-3), "the method does nothing"
    for one in found:
        assert torch.equal(one, expected)


def test_systems_that_are_no_patch_are_named():
    rows = {row["name"]: row for row in steer_names.others()}
    assert {"carve", "deepeyes", "rhea"} <= set(rows)
    assert not set(rows) & {row["name"] for row in steer_names.known()}
    for name, row in rows.items():
        assert row["entry"].startswith("regard.steer.") and row["what"], name
        with pytest.raises(ValueError, match=f"steer: {name} is not one patch but {row['entry']}"):
            steer_names.build(name, [])
