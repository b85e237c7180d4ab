"""LSceneLLM's magnifier: two softmaxes written out, its limits, and models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import lscenellm as benchmark
from tests.golden import adapter, load
from tests.models.tiny import ids, make
from tests.steer import moving
from tests.steer.tiny_vlm import llava

import regard
from regard import Causal, attend
from regard.models import SiteProbe, Spans, capture
from regard.steer.lscenellm import LSceneLLM, MagnifiedAttention, magnify, select_dense
from regard.steer.lscenellm_layer import scene_weights, select_scene

DATA = Path(__file__).parents[1] / "golden" / "data"
SPANS = Spans.of(14, scene=(2, 8), text=(9, 13))


@pytest.fixture(autouse=True)
def a_scene(monkeypatch):
    monkeypatch.setattr(moving, "SPANS", SPANS)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def features(n=3, batch=None, width=32, scene=6):
    shape = (scene, n, width) if batch is None else (batch, scene, n, width)
    return rand(*shape, seed=9).float()


def method(**changes):
    return LSceneLLM(**{"dense": features(), "first": 1, **changes})


@pytest.mark.parametrize(("heads", "kv_heads", "alpha"), [(4, 2, 1.0), (2, 2, 0.3)])
def test_is_two_softmaxes_written_out(heads, kv_heads, alpha):
    """All dense keys beside the others, closed in one softmax and opened where selected in the other."""
    n, dense, scene, text = 12, 3, (2, 6), (7, 12)
    q = rand(2, heads, n, 8)
    k, v = rand(2, kv_heads, n, 8, seed=1), rand(2, kv_heads, n, 8, seed=2)
    hd_k, hd_v = rand(2, kv_heads, 12, 8, seed=3), rand(2, kv_heads, 12, 8, seed=4)
    selected = rand(2, 5, 4, seed=5) > 0.3
    selected[0, 2] = False
    out, lse = attend(q, k, v, mask=Causal(), return_lse=True)
    rows = slice(*text)
    got = magnify(
        out[:, :, rows], lse[:, :, rows], q[:, :, rows], hd_k, hd_v, selected, alpha, 8**-0.5
    )
    group = heads // kv_heads
    keys, values = (
        torch.cat(pair, 2).repeat_interleave(group, 1) for pair in ((k, hd_k), (v, hd_v))
    )
    opened = torch.zeros(2, 1, n, 12, dtype=torch.bool)
    opened[:, 0, rows] = selected.repeat_interleave(dense, -1)
    causal = torch.ones(n, n).tril().bool().expand(2, 1, n, n)
    scores = q @ keys.mT / 8**0.5
    both = [
        scores.masked_fill(~torch.cat([causal, part], -1), -torch.inf).softmax(-1) @ values
        for part in (torch.zeros_like(opened), opened)
    ]
    want = (1 - alpha) * both[0] + alpha * both[1]
    torch.testing.assert_close(got, want[:, :, rows])
    # Rows that select nothing are ordinary attention.
    torch.testing.assert_close(got[0, :, 2], out[0, :, 9])
    # And the selection, from the weights written out.
    weights = scores[..., :n].masked_fill(~causal, -torch.inf).softmax(-1)
    found = scene_weights(q[:, :, rows], k[:, :, slice(*scene)], lse[:, :, rows], 8**-0.5)
    torch.testing.assert_close(found, weights[:, :, rows, slice(*scene)].sum(1))
    chosen = select_dense(weights, scene, text, dense)
    assert torch.equal(chosen[:, rows], select_scene(found).repeat_interleave(dense, -1))
    assert not chosen[:, :7].any()


def test_selection_is_written_out():
    weights = rand(3, 2, 9, 9).softmax(-1)
    chosen = select_dense(weights, (1, 5), (6, 9), 2, 0.4)
    for entry in range(3):
        for t in range(6, 9):
            row = weights[entry, :, t, 1:5].sum(0)
            scaled = (row - row.min()) / (row.max() - row.min())
            want = [bool(x > 0.4) for x in scaled for _ in range(2)]
            assert chosen[entry, t].tolist() == want
    assert not select_dense(torch.full((2, 9, 9), 1 / 9), (1, 5), (6, 9)).any()
    assert not select_scene(rand(4, 5), 1.0).any()


def test_limits():
    n, copies = 10, 3
    q, k, v = (rand(2, 4, n, 8, seed=s) for s in range(3))
    out, lse = attend(q, k, v, mask=Causal(), return_lse=True)
    rows, scene = slice(6, 10), slice(1, 5)
    hd_k, hd_v = (x[:, :, scene].repeat_interleave(copies, 2) for x in (k, v))
    every = torch.ones(2, 4, 4, dtype=torch.bool)
    got = magnify(out[:, :, rows], lse[:, :, rows], q[:, :, rows], hd_k, hd_v, every)
    # Copies of a scene token: its weight counts 1 + n times.
    bias = torch.zeros(n, n).double()
    bias[:, scene] = torch.tensor(1.0 + copies).log()
    want = attend(q, k, v, mask=Causal(), bias=bias)
    torch.testing.assert_close(got, want[:, :, rows])
    none = magnify(out[:, :, rows], lse[:, :, rows], q[:, :, rows], hd_k, hd_v, ~every)
    assert torch.equal(none, out[:, :, rows])
    half = magnify(out[:, :, rows], lse[:, :, rows], q[:, :, rows], hd_k, hd_v, every, 0.0)
    torch.testing.assert_close(half, out[:, :, rows])


def test_the_layer_starts_from_its_own_projections_and_learns():
    torch.manual_seed(0)
    layer = MagnifiedAttention(16, 2, 2)
    assert torch.equal(layer.k_proj_hd.weight, layer.k_proj.weight)
    x, dense = rand(2, 9, 16).float(), rand(2, 3, 2, 16, seed=1).float()
    selected = torch.zeros(2, 9, 6, dtype=torch.bool)
    selected[:, 6:, :4] = True
    out, chosen = layer(x, (1, 4), (6, 9), dense, selected)
    plain, again = layer(x, (1, 4), (6, 9))
    assert torch.equal(out[:, :6], plain[:, :6]) and torch.equal(chosen, again)
    assert (out - plain)[:, 6:].abs().max() > 1e-3
    out.sum().backward()
    assert layer.v_proj_hd.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="no dense features to open"):
        layer(x, (1, 4), (6, 9), None, selected)


@torch.no_grad()
def test_in_a_model_it_is_the_function():
    """One layer's output, from its inputs, by two softmaxes."""
    model, x = make("llama"), ids(2, 18)
    dense = features(batch=2)
    with (
        regard.patch(model, method(dense=dense), spans=SPANS),
        regard.watch(model, SiteProbe("weights", layers=[1])) as seen,
    ):
        heads = capture(model, x, "heads", "resid")
    weights = seen.result()[0][1]
    chosen = select_dense(weights, (2, 8), (9, 18), 1)[:, 9:]
    assert 0.1 < chosen.float().mean() < 0.9
    layer = model.model.layers[2]
    hidden = layer.input_layernorm(heads["resid", 1])
    attention = layer.self_attn
    q, k, v = (
        proj(hidden).unflatten(-1, (-1, 8)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    hd_k, hd_v = (
        proj(dense.flatten(1, 2)).unflatten(-1, (-1, 8)).transpose(1, 2)
        for proj in (attention.k_proj, attention.v_proj)
    )
    module = __import__(type(attention).__module__, fromlist=["apply_rotary_pos_emb"])

    def rotated(y, at):
        cos, sin = model.model.rotary_emb(y, at[None])
        return module.apply_rotary_pos_emb(y, y, cos, sin)[0]

    at = torch.arange(18)
    q, k = rotated(q, at), rotated(k, at)
    hd_k = rotated(hd_k, at[2:8].repeat_interleave(3))
    out, lse = attend(q, k, v, mask=Causal(), return_lse=True)
    want = out.clone()
    want[:, :, 9:] = magnify(out[:, :, 9:], lse[:, :, 9:], q[:, :, 9:], hd_k, hd_v, chosen)
    torch.testing.assert_close(heads["heads", 2], want.transpose(1, 2), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_only_rows_of_the_text_change_after_the_first_layer():
    model, x = make("llama"), ids(2, 18)
    plain = capture(model, x, "resid")
    with regard.patch(model, method(), spans=SPANS):
        got = capture(model, x, "resid")
    assert torch.equal(got["resid", 1], plain["resid", 1])
    assert torch.equal(got["resid", 2][:, :9], plain["resid", 2][:, :9])
    # The first row of the text opens something too.
    assert (got["resid", 2] - plain["resid", 2])[:, 9:].abs().amax(-1).min() > 1e-4


def test_moving_checks():
    moving.changes_something(method())
    moving.changes_nothing(method(threshold=1.0))
    moving.changes_nothing(method(alpha=0.0))
    moving.cached_is_uncached(method(), ("llama",))
    moving.pieces_are_the_whole(method())
    moving.leaves_the_model_as_it_was(method())
    moving.padding_does_not_matter(method)
    moving.beams_are_those_of_a_slow_search(method())


@torch.no_grad()
def test_other_projections():
    model, x = make("gpt_neox"), ids(2, 18)
    plain = model(x).logits
    with (
        regard.patch(model, method(), spans=SPANS),
        pytest.raises(ValueError, match="give projections="),
    ):
        model(x)
    # No dense value: the opened weight is lost, as if 0 had been read.
    given = {layer: (rand(32, 32).float(), torch.zeros(32, 32)) for layer in range(4)}
    with regard.patch(model, method(projections=given), spans=SPANS):
        got = model(x).logits
    torch.testing.assert_close(got[:, :9], plain[:, :9], atol=1e-5, rtol=1e-5)
    assert (got - plain)[:, 9:].abs().max() > 1e-3
    assert torch.equal(model(x).logits, plain)


@torch.no_grad()
def test_on_images():
    model, inputs, spans = llava()
    spans = Spans.of(23, scene=(3, 19), text=(19, 23))
    plain = model(**inputs).logits
    steer = method(dense=features(n=2, scene=16), first=0)
    with regard.patch(model, replace(steer, threshold=1.0), spans=spans):
        torch.testing.assert_close(model(**inputs).logits, plain, atol=1e-6, rtol=1e-6)
    with regard.patch(model, steer, spans=spans):
        steered = model(**inputs).logits
        tokens = model.generate(**inputs, **moving.GREEDY)
    assert (steered - plain)[:, 19:].abs().max() > 1e-3
    torch.testing.assert_close(steered[:, :19], plain[:, :19], atol=1e-5, rtol=1e-5)
    # The end of the text is not to come yet.
    assert tokens[0, 23] == steered[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_what_a_running_model_refuses():
    model, x = make("llama"), ids(1, 14)
    for given, spans, words in (
        (method(), None, r"no spans 'scene' and 'text'; give patch\("),
        (method(), Spans.of(14, scene=(2, 8)), "'text'"),
        (method(dense=features(scene=5)), SPANS, "expected features of 6 scene tokens"),
        (method(dense=features(batch=2)), SPANS, "for 1 sequences"),
    ):
        with regard.patch(model, given, spans=spans), pytest.raises(ValueError, match=words):
            model(x)
    other = make("gemma2", implementation="eager")
    with (
        regard.patch(other, method(), spans=SPANS),
        pytest.raises(ValueError, match="no plain softmax"),
    ):
        other(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: method(dense=torch.zeros(3, 4)), r"dense must be \(V, n, C\)"),
        (lambda: method(alpha=2.0), "alpha 2.0"),
        (lambda: MagnifiedAttention(9, 2), "expected a multiple"),
        (
            lambda: magnify(*[torch.zeros(1, 1, 2, 4)] * 5, torch.ones(1, 2, 3, dtype=torch.bool)),
            "does not fit 2 rows",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_golden_replays_of_less_text():
    case = load(DATA / "lscenellm.npz")
    # Causal: without its last token the rest stays as it is.
    for name in ("x0", "x1", "out0", "out1"):
        case[name] = case[name][:, :-1]
    for name in ("select0", "select1"):
        case[name] = case[name][:-1]
    got = adapter(DATA / "lscenellm.npz").replay(case)
    assert (got["select1"] == case["select1"]).all()
    assert abs(got["out1"] - case["out1"]).max() < 1e-4


def test_the_benchmark_shows_the_claim():
    notes = {r["name"]: r["note"] for r in benchmark.selection(trials=100)}
    right = {name: float(note.split()[0]) for name, note in notes.items()}
    assert right["selected"] > right["coarse only"] + 0.3
    assert right["selected"] >= right["all dense"] - 0.05
    growths = [float(r["note"].split("^")[1].split(":")[0]) for r in benchmark.growth((64, 256))]
    assert growths == pytest.approx([1, 1], abs=0.1)
