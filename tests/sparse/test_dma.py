"""Dynamic mask attention against its equations, transformers' layer, and its own decoding."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks import dma as benchmark

from regard import Causal, Full, Keys, SlidingWindow
from regard.core.data_masks import Documents
from regard.sparse.dma import (
    dynamic_mask,
    dynamic_mask_attention,
    key_scores,
)
from regard.sparse.dma_mask import KeptKeys, kept_until


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def best(scores, window, allowed):
    """Row by row, the `window` best of what is allowed; of equals the later."""
    out = torch.zeros_like(allowed)
    for i, row in enumerate(allowed.tolist()):
        keys = sorted((j for j, yes in enumerate(row) if yes), key=lambda j: (-scores[j], -j))
        out[i, keys[:window]] = True
    return out


def dense(q, k, v, delta, window, allowed):
    """The equations with the N x M mask written out, in float64."""
    q, k, v, delta = (x.double() for x in (q, k, v, delta))
    group, (b, hkv, m) = q.shape[1] // k.shape[1], k.shape[:3]
    mask = torch.full((b, hkv, q.shape[2], m), -torch.inf, dtype=torch.float64)
    for at in range(b):
        for h in range(hkv):
            kept = best(delta[at, h].tolist(), window, allowed)
            mask[at, h] = torch.where(kept, delta[at, h], -torch.inf)
    k, v, mask = (x.repeat_interleave(group, 1) for x in (k, v, mask))
    return (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1).nan_to_num(0.0) @ v


def inputs(n, m, b=2, h=4, hkv=2, d=6, dv=5):
    return [
        rand(b, h, n, d),
        rand(b, hkv, m, d, seed=1),
        rand(b, hkv, m, dv, seed=2),
        rand(b, hkv, m, seed=3).exp(),
    ]


@pytest.mark.parametrize("m", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("window", [1, 2, 7, 40])
def test_the_mask_is_each_rows_best(m, window):
    scores = torch.randint(6, (2, 2, m), generator=torch.Generator().manual_seed(m)).double()
    mask = dynamic_mask(scores, window, group=2)
    want = torch.stack(
        [
            torch.stack([best(row.tolist(), window, Causal().dense(m)) for row in entry])
            for entry in scores
        ]
    ).repeat_interleave(2, 1)
    assert torch.equal(mask.dense(m), want)
    for n in {m, (m + 1) // 2, 1}:
        for block in (1, 4, 64):
            lists = mask.lists(n, m, block)
            assert torch.equal(lists.dense(), want[:, :, m - n :])
            assert int(lists.counts.max()) <= window + block
            assert torch.equal(mask.blocks(n, m, block).dense(), want[:, :, m - n :])
        assert torch.equal(mask.layout(n, m, (3, 4)).dense(), want[:, :, m - n :])


def test_equal_scores_are_a_sliding_window():
    mask = dynamic_mask(torch.ones(1, 1, 30), 7)
    assert torch.equal(mask.dense(30)[0, 0], SlidingWindow(6).dense(30))


def test_no_later_key_has_a_say_and_dropped_keys_do_not_return():
    scores = rand(1, 2, 40)
    before = kept_until(scores, 5)
    scores[..., 20:] += 10
    after = kept_until(scores, 5)
    assert torch.equal(before[..., :20].clamp(max=20), after[..., :20].clamp(max=20))
    kept = dynamic_mask(scores, 5).dense(40)
    assert bool((kept.diff(dim=-2).long().abs().sum(-2) <= 2).all())


def test_a_rows_own_token_may_be_dropped_but_no_row_is_empty():
    mask = dynamic_mask(-torch.arange(20.0)[None, None], 3).dense(20)[0, 0]
    assert not bool(mask.diagonal()[3:].any())
    assert torch.equal(mask.sum(-1), torch.arange(1, 21).clamp(max=3))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (66, 66), (5, 33), (1, 40), (150, 161)])
@pytest.mark.parametrize("window", [1, 6, 50])
def test_is_the_papers_equations(n, m, window):
    q, k, v, delta = inputs(n, m)
    want = dense(q, k, v, delta, window, Causal().dense(n, m))
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, delta, window), want)
    single = dynamic_mask_attention(*(x.float() for x in (q, k, v, delta)), window)
    torch.testing.assert_close(single.double(), want, atol=1e-5, rtol=1e-4)
    halves = dynamic_mask_attention(*(x.bfloat16() for x in (q, k, v)), delta.float(), window)
    assert halves.dtype == torch.bfloat16
    exact = dense(*(x.bfloat16() for x in (q, k, v)), delta.float(), window, Causal().dense(n, m))
    torch.testing.assert_close(halves.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (Full(), KeptKeys),
        (Causal() & Keys(torch.arange(24) > 4), KeptKeys),
        (Causal() & SlidingWindow(9), object),
        (Causal() & Documents(torch.arange(24) // 10), object),
    ],
)
def test_the_choice_is_made_among_what_the_mask_allows(mask, kind):
    q, k, v, delta = inputs(24, 24)
    assert isinstance(dynamic_mask(delta, 5, mask, group=2), kind)
    out = dynamic_mask_attention(q, k, v, delta, 5, mask=mask)
    torch.testing.assert_close(out, dense(q, k, v, delta, 5, mask.dense(24)))


def test_padding_that_differs_between_entries_and_rows_without_keys():
    q, k, v, delta = inputs(12, 12)
    valid = torch.arange(12) >= torch.tensor([[0], [5]])
    out = dynamic_mask_attention(q, k, v, delta, 3, mask=Causal() & Keys(valid))
    alone = dynamic_mask_attention(*(x[1:, :, 5:] for x in (q, k, v, delta)), 3)
    torch.testing.assert_close(out[1:, :, 5:], alone)
    assert bool((out[1, :, :5] == 0).all())
    torch.testing.assert_close(out[:1], dynamic_mask_attention(q[:1], k[:1], v[:1], delta[:1], 3))


def test_cross_attention_shares_one_list():
    q, k, v, delta = inputs(70, 20)
    kept = dynamic_mask(delta, 6, Full(), group=2).dense(70, 20)
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
    assert bool((kept.sum(-1) == 6).all())
    out = dynamic_mask_attention(q, k, v, delta, 6, mask=Full())
    torch.testing.assert_close(out, dense(q, k, v, delta, 6, Full().dense(70, 20)))


def test_gradients_reach_scores_through_the_logits():
    q, k, v, delta = (x.requires_grad_() for x in inputs(5, 5, b=1, h=2, hkv=1, d=2, dv=2))
    for window in (2, 5):
        assert torch.autograd.gradcheck(
            lambda *x, w=window: dynamic_mask_attention(*x, w), (q, k, v, delta)
        )


def test_scores_are_the_formula_and_stay_finite_in_half_precision():
    v, weight, bias = rand(2, 2, 7, 3), rand(2, 6, seed=1), rand(2, seed=2)
    a = torch.tensor([0.5, -2.0], dtype=torch.float64)
    for b in range(2):
        for j in range(7):
            x = weight @ v[b, :, j].flatten() + bias
            step = a * torch.log1p(x.exp())
            torch.testing.assert_close(key_scores(v, weight, bias, a)[b, :, j], step.exp())
            linear = key_scores(v, weight, bias, a, "linear")[b, :, j]
            torch.testing.assert_close(linear, step)
    large = key_scores(*(x.half() for x in (v * 0, weight, bias * 0 + 20, a + 1)))
    assert large.dtype == torch.float32 and bool(torch.isfinite(large).all())
    assert float(large.max()) > torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dynamic_mask(torch.zeros(2, 3), 1), r"scores must be \(B, Hkv, M\)"),
        (
            lambda: dynamic_mask(torch.zeros(1, 1, 9), 2, Causal() & Keys(torch.ones(5) > 0)),
            "mask covers 5 keys, expected 9",
        ),
        (
            lambda: dynamic_mask_attention(*inputs(4, 4)[:3], torch.zeros(2, 2, 5), 2),
            r"delta is \(2, 2, 5\)",
        ),
        (lambda: KeptKeys(torch.zeros(2, 3)), "until must be int64"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_benchmark_counts_linear_growth():
    rows = benchmark.growth(sizes=(2048, 4096, 8192), window=32)
    assert any("N^1.0" in r["note"] for r in rows)
