"""TidalDecode against its algorithm written out, dense decoding, and decoding token by token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import tidaldecode as benchmark
from tests.golden import adapter, load
from tests.models.tiny import ids, left_padding, make

import regard
from regard import Causal, SlidingWindow, attend
from regard.core.token_select import TopTokens
from regard.models.select_method import SelectMethod
from regard.sparse.tidaldecode import TidalDecode, TidalState

DATA = Path(__file__).parents[1] / "golden" / "data"
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers_of(count, n, m, b=2, h=4, hkv=2, d=6):
    """q, k, v of several layers."""
    return [
        tuple(rand(b, heads, x, d, seed=7 * layer + c) for c, (heads, x) in enumerate(shapes))
        for layer in range(count)
        for shapes in [((h, n), (hkv, m), (hkv, m))]
    ]


def written_out(layers, top_k, start, correct):
    """The dense emulation of `modify_llama.py`: a mask of the top keys handed from layer to layer."""
    kept, outs = None, []
    for layer, (q, k, v) in enumerate(layers):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        n, m = q.shape[2], k.shape[2]
        weights = q @ k.mT / math.sqrt(q.shape[-1])
        weights = weights.masked_fill(torch.ones(n, m).triu(m - n + 1).bool(), -torch.inf)
        if layer == start or layer in correct:
            places = weights.topk(min(top_k, m), -1).indices
            kept = torch.zeros_like(weights).scatter_(-1, places, 1.0)
        elif layer > start:
            weights = weights.masked_fill(kept == 0, -torch.inf)
        outs.append(weights.softmax(-1) @ v)
    return outs


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (1, 30), (5, 31)])
@pytest.mark.parametrize(("start", "correct"), [(0, ()), (1, (3,)), (2, (3, 5)), (9, ())])
def test_is_the_algorithm_written_out(n, m, start, correct):
    layers = layers_of(6, n, m)
    state = TidalState(7, start, correct, teacher_forced=True)
    for layer, want in enumerate(written_out(layers, 7, start, correct)):
        torch.testing.assert_close(state.attend(layer, *layers[layer]), want)


@pytest.mark.parametrize("share", ["head", "kv", "all"])
def test_limits_are_dense_attention(share):
    layers = layers_of(4, 3, 20)
    for state in (
        TidalState(20, 0, (), share),
        TidalState(1, 0, (1, 2, 3), share),
        TidalState(1, 4, (), share),
    ):
        for layer, (q, k, v) in enumerate(layers):
            torch.testing.assert_close(state.attend(layer, q, k, v), attend(q, k, v, mask=Causal()))


def test_a_prompt_is_dense_unless_teacher_forced():
    (q, k, v), other = layers_of(2, 9, 9)
    state = TidalState(2, 0, ())
    state.attend(0, q, k, v)
    assert state.chosen is None
    torch.testing.assert_close(state.attend(1, *other), attend(*other, mask=Causal()))
    forced = TidalState(2, 0, (), teacher_forced=True)
    forced.attend(0, q, k, v)
    assert forced.chosen.counts.amax() == 2
    assert not torch.allclose(forced.attend(1, *other), attend(*other, mask=Causal()))


def test_sharing_modes_and_the_own_token():
    (q, k, _), _ = layers_of(2, 1, 40)
    heads = {"head": 4, "kv": 2, "all": 1}
    for share, count in heads.items():
        state = TidalState(5, 0, (), share)
        assert state.layout(0, q, k) is None
        assert state.chosen.index.shape == (2, max(count, 2), 1, 5)
        if share == "all":
            assert torch.equal(state.chosen.index[:, 0], state.chosen.index[:, 1])
        own = TidalState(5, 0, (), share, own=True)
        own.layout(0, q, k)
        assert (own.chosen.index[..., -1] == 39).all() and own.chosen.index.shape[-1] == 5
    # The paper's own sets do not hold the new token by force.
    low = q.clone(), k.clone()
    low[1][:, :, -1] = -100 * low[0][:, ::2, -1]
    state = TidalState(5, 0, ())
    state.layout(0, *low)
    assert not (state.chosen.index[:, ::2] == 39).any()


def test_a_layer_with_a_window_of_its_own_stays_inside_it():
    (q, k, _), (q1, k1, _) = layers_of(2, 6, 30)
    state = TidalState(9, 0, ())
    state.layout(0, q, k, mask=Causal())
    window = Causal() & SlidingWindow(8)
    narrow = state.layout(1, q1, k1, mask=window).dense()
    assert torch.equal(narrow, state.chosen.dense() & window.dense(6, 30))
    assert state.layout(1, q1, k1, mask=Causal()) is state.chosen


@torch.no_grad()
@pytest.mark.parametrize("share", ["head", "kv", "all"])
def test_one_teacher_forced_pass_is_decoding_token_by_token(share):
    model, x = make("llama"), ids(2, 14)
    knobs = {"top_k": 3, "start": 1, "correct": (), "share": share}
    with regard.patch(model, TidalDecode(**knobs, teacher_forced=True)):
        whole = model(x).logits
    with regard.patch(model, TidalDecode(**knobs)):
        out = model(x[:, :1], use_cache=True)
        steps = [out.logits]
        for t in range(1, 14):
            cache = out.past_key_values
            steps.append(model(x[:, t : t + 1], past_key_values=cache).logits)
        # The sparse layers have cached every token.
        assert [cache.get_seq_length(layer) for layer in range(4)] == [14] * 4
        # A block of tokens to verify has one set a row.
        cache.crop(-5)
        block = model(x[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole, **TOLERANCE)
    torch.testing.assert_close(block, whole[:, 9:], **TOLERANCE)
    assert not torch.allclose(whole, model(x).logits, atol=1e-2)


@torch.no_grad()
def test_generation_with_padding_is_that_of_each_sequence_alone():
    model, x, mask = make("llama"), ids(2, 12), left_padding(2, 12, 5)
    method = TidalDecode(4, 0, (2,), "all")
    long = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    long |= {"return_dict_in_generate": True}
    with regard.patch(model, method):
        both = model.generate(x, attention_mask=mask, **long)
        for entry in range(2):
            own = x[entry : entry + 1, mask[entry] == 1]
            alone = model.generate(own, **long)
            assert torch.equal(alone.sequences[0, -6:], both.sequences[entry, -6:])
            for a, b in zip(alone.logits, both.logits, strict=True):
                torch.testing.assert_close(a[0], b[entry], **TOLERANCE)
    plain = model.generate(x, attention_mask=mask, **long)
    assert not torch.allclose(plain.logits[-1], both.logits[-1], atol=1e-2)


@torch.no_grad()
def test_limits_in_a_model():
    model, x = make("llama"), ids(2, 10)
    long = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = model.generate(x, **long)
    for method in (TidalDecode(99, 0), TidalDecode(1, 0, (1, 2, 3)), TidalDecode(1, 9, ())):
        with regard.patch(model, method):
            assert torch.equal(model.generate(x, **long), plain)
    assert torch.equal(model.generate(x, **long), plain)


@torch.no_grad()
def test_what_a_running_model_refuses():
    model, x = make("llama"), ids(1, 8)
    with (
        regard.patch(model, TidalDecode(2, 0, (), teacher_forced=True), layers=[1, 2]),
        pytest.raises(ValueError, match="none has chosen in this step; layer 0 must run first"),
    ):
        model(x)
    chosen = SelectMethod(TopTokens(2))
    with (
        regard.patch(model, TidalDecode(2, 0), chosen),
        pytest.raises(ValueError, match="another method has chosen keys in layer 0"),
    ):
        model(x)
    capped = make("gemma2", implementation="eager")
    with (
        regard.patch(capped, TidalDecode(2, 0, share="all")),
        pytest.raises(ValueError, match="use share='head'"),
    ):
        capped(x)
    windows = make("gemma3")
    with (
        regard.patch(windows, TidalDecode(2, 0, ())),
        pytest.raises(ValueError, match="patch only layers that hold the same keys"),
    ):
        windows.generate(x, max_new_tokens=3, min_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TidalState(0), "TidalState: keep must be an integer >= 1"),
        (lambda: TidalDecode(4, -1), "TidalDecode: start must be an integer >= 0, got -1"),
        (lambda: TidalDecode(4, 2, (2,)), "correct must be an integer >= 3, got 2"),
        (lambda: TidalDecode(4, share="none"), "share must be one of head, kv, all"),
        (lambda: TidalState(4).attend(0, *layers_of(1, 5, 3)[0]), "5 queries over 3 keys"),
        (lambda: TidalState(4, 0, ()).attend(1, *layers_of(1, 1, 3)[0]), "layer 0 must run first"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_step_that_was_not_begun_is_noticed():
    state = TidalState(4, 0, ())
    state.attend(0, *layers_of(1, 1, 9)[0])
    with pytest.raises(ValueError, match=r"call begin_step\(\) before each token"):
        state.attend(1, *layers_of(1, 1, 10)[0])
    state.begin_step()
    with pytest.raises(ValueError, match="none has chosen"):
        state.attend(1, *layers_of(1, 1, 9)[0])


def test_golden_replays_at_other_sizes():
    case = load(DATA / "tidaldecode.npz")
    # Causal, so that a shorter run of one sequence is the beginning of the longer one.
    short = case["meta"]["config"]["prefill"] + 2
    case["x"] = case["x"][1:, :short]
    got = adapter(DATA / "tidaldecode.npz").replay(case)
    np.testing.assert_allclose(got["y"], case["y"][1:, :short], rtol=1e-4, atol=1e-5)
    assert (got["selected"] == case["selected"][:2, :, 1:, :, :short]).all()


def test_work_of_a_sparse_layer_does_not_grow():
    rows = {r["name"].split(",")[0]: r["note"] for r in benchmark.growth((256, 1024, 4096))}
    assert "M^1.00" in rows["selecting layer"] and "M^0.00" in rows["sparse layer"]


@pytest.mark.slow
def test_correction_helps_on_smollm2():
    loss = {r["name"]: float(r["note"].split()[0]) for r in benchmark.claim(windows=1)}
    order = ["dense", "every layer selects", "correction at 13", "correction at 9", "no correction"]
    found = [next(v for name, v in loss.items() if name.startswith(one)) for one in order]
    assert found == sorted(found) and found[-1] > found[2] + 0.3
