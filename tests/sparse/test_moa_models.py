"""MoA's ring cache, its profile of a model, and a plan in a running model."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from tests.models.tiny import ids, left_padding, make

import regard
from regard.sparse.moa import MoA, MoACache, MoAPlan, SinkBands, moa_attention, profile
from regard.sparse.moa_profile import block_influence

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the cache


@pytest.mark.parametrize("chunks", [[1] * 40, [23, 1, 1, 6, 1, 8], [40], [3, 37], [10, 10, 10, 10]])
@pytest.mark.parametrize("sinks", [0, 4])
def test_the_ring_is_attention_under_the_spans(chunks, sinks):
    spans = [5, 12, 64]
    q, k, v = rand(2, 6, 40, 5), rand(2, 3, 40, 5, seed=1), rand(2, 3, 40, 4, seed=2)
    want = moa_attention(q, k, v, spans, sinks=sinks)
    cache, outs, at = MoACache(spans, sinks), [], 0
    for size in chunks:
        outs.append(cache.attend(*(x[:, :, at : at + size] for x in (q, k, v))))
        at += size
        assert cache.length == at and cache.slots == sum(min(at, span) for span in spans)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    for head, span in enumerate(spans):
        place = torch.arange(40)
        stays = (place < sinks) | (place >= 40 - (span - sinks))
        assert torch.equal(cache.keys(head)[0][:, 0], k[:, head, stays])
        assert torch.equal(cache.keys(head)[1][:, 0], v[:, head, stays])


def test_a_span_beside_the_sinks_keeps_the_own_token():
    cache = MoACache([3], sinks=64)
    x = rand(1, 1, 9, 4)
    for t in range(9):
        out = cache.attend(*(x[:, :, t : t + 1],) * 3)
    want = torch.cat([x[:, :, :2], x[:, :, 8:]], 2)
    assert torch.equal(cache.keys(0)[0], want)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MoACache([]), "spans must be integers >= 2"),
        (lambda: MoACache([4, 1]), "spans must be integers >= 2"),
        (lambda: MoACache([4], sinks=-1), "sinks must be an integer >= 0"),
        (lambda: MoACache([4, 4]).attend(*(rand(1, 1, 2, 3),) * 3), "made for 2 key heads"),
        (lambda: MoA(MoAPlan(((0.0,),), ((1.0,),)), rule="ring"), "rule must be 'cache' or"),
        (lambda: MoA(MoAPlan(((0.0,),), ((1.0,),)), new_tokens=-1), "must be >= 0"),
        (lambda: profile(None, []), "all of one length"),
        (lambda: profile(None, [torch.zeros(2, 4)]), "all of one length"),
        (lambda: profile(None, [torch.zeros(1, 4)], first=4), r"first must lie in \[1, 3\]"),
        (lambda: profile(None, [torch.zeros(1, 4)], kind="sum"), "kind must be one of"),
        (lambda: profile(None, [torch.zeros(1, 4)], block=0), "block must be an integer"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the profile


def test_the_profile_is_that_of_the_models_dense_weights():
    """transformers' own eager attention keeps A, and autograd gives dL/dA."""
    model = make("llama", implementation="eager")
    samples = [ids(1, 21, seed) for seed in (3, 4)]
    want = 0
    for x in samples:
        out = model(x, output_attentions=True, use_cache=False)
        loss = F.cross_entropy(out.logits[0, :-1], x[0, 1:])
        grads = torch.autograd.grad(loss, out.attentions)
        layers = [
            block_influence(a.detach(), g, 8, "block").unflatten(1, (2, -1)).sum((0, 2))
            for a, g in zip(out.attentions, grads, strict=True)
        ]
        want = want + torch.stack(layers).double()
    found = profile(model, samples, block=8)
    assert found.length == 21 and found.blocks.shape == (4, 2, 3, 3)
    torch.testing.assert_close(found.blocks, want / 2, atol=2e-5, rtol=2e-3)
    assert all(p.grad is None for p in model.parameters())


def test_the_profile_refuses_attention_that_is_no_softmax():
    with pytest.raises(ValueError, match="soft-capped"):
        profile(make("gemma2", implementation="eager"), [ids(1, 9)], block=4)


# --- in a model


PLAN = MoAPlan(((0.0, 0.0), (4.0, 8.0), (0.0, 4.0), (0.0, 0.0)), ((0.25, 0.5), (0.0, 0.0)) * 2, 4)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["profile", "cache"])
def test_a_plan_masks_each_layer_and_key_head(rule):
    model, x = make("llama"), ids(2, 200 if rule == "cache" else 26)
    method = MoA(PLAN, rule, sinks=4)
    seen = []

    class Look:
        def attention(self, call, out):
            seen.append(call.mask.dense(call.n, call.m))

        def result(self):
            return seen

    with regard.patch(model, method), regard.watch(model, Look()):
        model(x, use_cache=False)
    n = x.shape[1]
    for layer, got in enumerate(seen):
        if rule == "profile":
            bands, sinks, unit = PLAN.bands(n)[layer], 1, 4
        else:
            bands, sinks, unit = PLAN.spans(n)[layer] - 4, 4, 1
        for head in range(4):
            want = SinkBands((int(bands[head // 2]),), sinks, unit).dense(n)[0]
            assert torch.equal(got.expand(4, n, n)[head], want)
    assert len(seen) == 4


@torch.no_grad()
def test_decoding_is_the_whole_pass_and_full_spans_are_dense():
    model, x = make("llama"), ids(2, 30)
    whole_plan = MoAPlan(((0.0, 0.0),) * 4, ((1.0, 1.0),) * 4, 4)
    dense = model(x, use_cache=False).logits
    for rule in ("profile", "cache"):
        with regard.patch(model, MoA(whole_plan, rule)):
            torch.testing.assert_close(model(x, use_cache=False).logits, dense, **TOLERANCE)
    method = MoA(PLAN, "profile")
    with regard.patch(model, method):
        out = model(x[:, :22], use_cache=True)
        parts, cache = [out.logits], out.past_key_values
        for t in range(22, 30):
            parts.append(model(x[:, t : t + 1], past_key_values=cache).logits)
    # Spans belong to the prompt's length: 22 tokens in blocks of 4 are as many as 24.
    bands = [method.bands(layer, 22) for layer in range(4)]
    masks = [SinkBands(tuple(b for b in band.bands for _ in range(2)), 1, 4) for band in bands]
    with _layers(model, masks):
        want = model(x, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), want, **TOLERANCE)
    assert not torch.allclose(want, dense, atol=1e-2)


def _layers(model, masks):
    """One mask for each layer, patched one by one."""
    stack = ExitStack()
    for layer, mask in enumerate(masks):
        stack.enter_context(regard.patch(model, mask, layers=[layer]))
    return stack


@torch.no_grad()
def test_generation_with_padding_is_that_of_each_sequence_alone():
    model, x, mask = make("llama"), ids(2, 24), left_padding(2, 24, 2)
    plan = MoAPlan(((8.0, 12.0), (4.0, 4.0)) * 2, ((0.0, 0.0),) * 4, 4)
    long = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with regard.patch(model, MoA(plan, "profile")):
        together = model.generate(x, attention_mask=mask, **long)
        for entry in range(2):
            alone = model.generate(x[entry : entry + 1, mask[entry] == 1], **long)
            assert torch.equal(alone[0, -6:], together[entry, -6:])


def test_a_plan_for_another_model_is_refused():
    model, x = make("llama"), ids(1, 9)
    for plan in (
        MoAPlan(((0.0, 0.0),) * 3, ((1.0, 1.0),) * 3),
        MoAPlan(((0.0, 0.0),) * 5, ((1.0, 1.0),) * 5),
        MoAPlan(((0.0,) * 3,) * 4, ((1.0,) * 3,) * 4),
    ):
        with regard.patch(model, MoA(plan)), pytest.raises(ValueError, match="the plan is for"):
            model(x)
