"""HyLRA's runtime: sharing selections across layers, in tensors and in running models."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks import hylra as benchmark
from tests.models.tiny import ids, left_padding, make

import regard
from regard import Causal, SlidingWindow, attend
from regard.core.select import Selector
from regard.core.token_select import TopTokens
from regard.models.select_method import SelectMethod
from regard.sparse.generic import ExactTopK
from regard.sparse.hylra import HashBlocks, LayerReuse, ReuseState

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers_of(count, n, m, b=2, h=4, hkv=2, d=6):
    """q, k, v of several layers."""
    return [
        tuple(
            rand(b, heads, x, d, seed=7 * layer + c)
            for c, (heads, x) in enumerate([(h, n), (hkv, m), (hkv, m)])
        )
        for layer in range(count)
    ]


def written_out(layers, policy, full, keep, chunk):
    """One decoding step: the top chunks of a key head, handed to the layers that reuse them."""
    tables, outs = {}, []
    for layer, (q, k, v) in enumerate(layers):
        (b, h, n, d), (hkv, m) = q.shape, k.shape[1:3]
        scores = q @ k.repeat_interleave(h // hkv, 1).mT / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(n, m).triu(m - n + 1).bool(), -torch.inf)
        if layer not in full:
            if policy[layer] < 0:
                mass = scores.softmax(-1).view(b, hkv, h // hkv, n, m).sum(2)
                mass = torch.cat([mass, mass.new_zeros(b, hkv, n, -m % chunk)], -1)
                mass = mass.view(b, hkv, n, -1, chunk).sum(-1)
                table = torch.zeros_like(mass).scatter_(-1, mass.topk(keep, -1).indices, 1.0)
                table = table.repeat_interleave(chunk, -1)[..., :m].repeat_interleave(h // hkv, 1)
                tables[layer] = table
            source = layer if policy[layer] < 0 else policy[layer]
            scores = scores.masked_fill(tables[source] == 0, -torch.inf)
        outs.append(scores.softmax(-1) @ v.repeat_interleave(h // hkv, 1))
    return outs


@pytest.mark.parametrize(("n", "m"), [(1, 30), (1, 12), (3, 31)])
@pytest.mark.parametrize("chunk", [1, 4])
def test_reuse_is_the_runtime_written_out(n, m, chunk):
    policy, full = (-1, -1, 1, 1, -1, 4, 1), (0,)
    layers = layers_of(7, n, m)
    state = ReuseState(policy, full, TopTokens(3, block=chunk, share="kv"))
    for layer, want in enumerate(written_out(layers, policy, full, 3, chunk)):
        torch.testing.assert_close(state.attend(layer, *layers[layer]), want)


def test_limits_are_dense_attention():
    layers = layers_of(4, 2, 20)
    for state in (
        ReuseState([-1] * 4, (), TopTokens(20)),
        ReuseState([-1, 0, 0, 0], (), TopTokens(5, block=4)),
        ReuseState([-1] * 4, range(4), TopTokens(1)),
        ReuseState([-1, 0, -1, 2], (), HashBlocks(9, 4, bits=6)),
    ):
        for layer, (q, k, v) in enumerate(layers):
            want = attend(q, k, v, mask=Causal())
            torch.testing.assert_close(state.attend(layer, q, k, v), want)


def test_a_layer_with_a_window_of_its_own_stays_inside_it():
    (q, k, _), (q1, k1, _) = layers_of(2, 3, 30)
    state = ReuseState([-1, 0], (), TopTokens(9))
    chosen = state.layout(0, q, k, mask=Causal())
    assert state.layout(1, q1, k1, mask=Causal()) is chosen
    window = Causal() & SlidingWindow(8)
    narrow = state.layout(1, q1, k1, mask=window).dense()
    assert torch.equal(narrow, chosen.dense() & window.dense(3, 30))


@torch.no_grad()
@pytest.mark.parametrize(
    "selector",
    [TopTokens(3), TopTokens(2, block=3, share="kv", recent=1), HashBlocks(2, 3, 8, 0, 1)],
)
def test_one_teacher_forced_pass_is_decoding_token_by_token(selector):
    model, x = make("llama"), ids(2, 14)
    policy, full = (-1, -1, 1, -1), (0,)
    with regard.patch(model, LayerReuse(policy, full, selector, teacher_forced=True)):
        whole = model(x).logits
    with regard.patch(model, LayerReuse(policy, full, selector)):
        out = model(x[:, :1], use_cache=True)
        steps, cache = [out.logits], out.past_key_values
        for t in range(1, 14):
            steps.append(model(x[:, t : t + 1], past_key_values=cache).logits)
        assert [cache.get_seq_length(layer) for layer in range(4)] == [14] * 4
        # A cropped cache takes the selector's codes with it.
        cache.crop(-6)
        again = [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(8, 14)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **TOLERANCE)
    torch.testing.assert_close(torch.cat(again, 1), whole[:, 8:], **TOLERANCE)
    assert not torch.allclose(whole, model(x).logits, atol=1e-2)


@torch.no_grad()
def test_generation_with_padding_is_that_of_each_sequence_alone():
    model, x, mask = make("llama"), ids(2, 12), left_padding(2, 12, 5)
    method = LayerReuse((-1, 0, -1, 2), (), TopTokens(4, share="kv", recent=1))
    long = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    long |= {"return_dict_in_generate": True}
    with regard.patch(model, method):
        both = model.generate(x, attention_mask=mask, **long)
        for entry in range(2):
            alone = model.generate(x[entry : entry + 1, mask[entry] == 1], **long)
            assert torch.equal(alone.sequences[0, -6:], both.sequences[entry, -6:])
            for a, b in zip(alone.logits, both.logits, strict=True):
                torch.testing.assert_close(a[0], b[entry], **TOLERANCE)
    plain = model.generate(x, attention_mask=mask, **long)
    assert not torch.allclose(plain.logits[-1], both.logits[-1], atol=1e-2)


class OneChoice(Selector):
    """The same blocks for all sequences: what must be refused."""

    def select(self, q, k, *, mask=None, state=None):
        layout = TopTokens(2).select(q[:1], k[:1], mask=mask)
        return layout


@torch.no_grad()
def test_what_a_running_model_refuses():
    model, x = make("llama"), ids(2, 8)

    def run(method, words, **more):
        with regard.patch(model, method, **more), pytest.raises(ValueError, match=words):
            model(x)

    policy, top = (-1, 0, 0, 0), TopTokens(2)
    run(LayerReuse((-1, 0), (), top), "the policy has 2 layers, the model a layer 2")
    run(LayerReuse(policy, (), top, True), "reuses layer 0, which has chosen nothing", layers=[1])
    run(LayerReuse(policy, (), OneChoice(), True), "one choice for a batch of 2")
    run(LayerReuse(policy, (), ExactTopK(2, 4), True), "chose for 4 rows together")
    with (
        regard.patch(model, LayerReuse(policy, (), top), SelectMethod(top)),
        pytest.raises(ValueError, match="another method has chosen keys in layer 0"),
    ):
        model(x)
    windows = make("gemma3")
    with (
        regard.patch(windows, LayerReuse(policy, (), top)),
        pytest.raises(ValueError, match="plan only layers that hold the same keys"),
    ):
        windows.generate(x, max_new_tokens=3, min_new_tokens=3, do_sample=False)


def test_a_step_that_was_not_begun_is_noticed():
    state = ReuseState([-1, 0], (), TopTokens(2))
    state.attend(0, *layers_of(1, 1, 9)[0])
    with pytest.raises(ValueError, match=r"call begin_step\(\) before each token"):
        state.attend(1, *layers_of(1, 1, 10)[0])
    state.begin_step()
    with pytest.raises(ValueError, match="has chosen nothing in this step"):
        state.attend(1, *layers_of(1, 1, 9)[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LayerReuse((0,)), r"policy\[0\] is 0, which does not come before layer 0"),
        (lambda: LayerReuse((-1, 0, 1)), r"policy\[2\] is 1, a layer that reuses another's"),
        (lambda: LayerReuse((-1, 0), (0,)), r"policy\[1\] is 0, a layer with full attention"),
        (lambda: LayerReuse((-1, 0), (1,)), "but layer 1 is in full"),
        (lambda: LayerReuse((-1, -2)), "expected -1 or an earlier layer"),
        (lambda: LayerReuse((-1,), (3,)), r"full names layers \[3\], but policy has 1"),
        (lambda: LayerReuse((-1,), (), "exact"), "selector must be a Selector, got str"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_work_of_a_reusing_layer_does_not_grow():
    rows = {r["name"].split(",")[0]: r["note"] for r in benchmark.growth((256, 1024, 4096))}
    assert "M^1.00" in rows["full layer"] and "M^0.00" in rows["reusing layer"]
    assert "M^1.00" in rows["selecting layer"]


@pytest.mark.slow
def test_the_plan_beats_even_spacing_on_smollm2():
    loss = {
        r["name"]: float(r["note"].split()[0]) for r in benchmark.claim() if "nats" in r["note"]
    }
    planned = loss["planned, profile in chunks of 2"]
    assert loss["dense"] < planned < loss["evenly spaced, first layers full"]
