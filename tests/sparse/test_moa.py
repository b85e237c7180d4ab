"""MoA's rules, influence, planning and plans."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from benchmarks import moa as benchmark

from regard import Causal, Sinks, SlidingWindow, attend
from regard.sparse.moa import (
    Influence,
    SinkBands,
    block_influence,
    candidates,
    influence,
    moa_attention,
    moa_layout,
    rule_density,
    rule_losses,
    runtime_spans,
)
from regard.sparse.moa_profile import call_influence


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal_weights(*lead, n):
    hidden = torch.ones(n, n).triu(1).bool()
    return rand(*lead, n, n).masked_fill(hidden, -torch.inf).softmax(-1)


# --- rules


def test_layout_is_sink_and_latest_blocks():
    alpha, beta = [0.0, 128.0, -64.0, 0.0], [1.0, 0.0, 0.5, 0.01]
    got = moa_layout(alpha, beta, 6)
    for rule, band in enumerate((6, 2, 2, 1)):
        for row, key in product(range(6), range(6)):
            want = key <= row and (key == 0 or row - key < band)
            assert bool(got[rule, row, key]) is want
    assert torch.equal(got[0], torch.ones(6, 6).tril().bool())
    widest = got.sum(-1).amax(-1).double() / 6
    torch.testing.assert_close(rule_density(alpha, beta, 6), widest)


def test_the_same_rule_everywhere_is_sink_and_window():
    layout = moa_layout([192.0], [0.0], 9)[0]
    assert torch.equal(layout, (Causal() & (SlidingWindow(2) | Sinks(1))).dense(9))
    mask = SinkBands((5, 5), sinks=3)
    assert torch.equal(mask.dense(20)[1], (Causal() & (SlidingWindow(4) | Sinks(3))).dense(20))
    blocks = SinkBands((3,), sinks=1, unit=4).dense(24)[0]
    want = moa_layout([12.0], [0.0], 6, block=4)[0]
    want = want.repeat_interleave(4, 0).repeat_interleave(4, 1) & Causal().dense(24)
    assert torch.equal(blocks, want)


@pytest.mark.parametrize("unit", [1, 3, 8])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_tiles_of_the_mask_are_exact(unit, sinks):
    mask = SinkBands((1, 2, 5, 50), sinks, unit)
    dense = mask.dense(60)
    i = torch.arange(60)
    i0, i1, j0, j1 = torch.meshgrid(i[::7], i[::7], i[::5], i[::5], indexing="ij")
    fits = (i0 <= i1) & (j0 <= j1)
    corners = [x[fits] for x in (i0, i1, j0, j1)]
    for h in range(4):
        some, every = mask.tile(*corners, h)
        for at, (a, b, c, d) in enumerate(zip(*(x.tolist() for x in corners), strict=True)):
            part = dense[h, a : b + 1, c : d + 1]
            assert bool(some[at]) == bool(part.any()) and bool(every[at]) == bool(part.all())


def test_candidates_fit_every_length():
    rules = candidates([2048, 4096, 8192], 16384)
    assert (0.0, 1.0) in rules and (0.0, 0.0) not in rules and len(set(rules)) == len(rules)
    for alpha, beta in rules:
        assert alpha + 2048 * beta > 0
        assert all(alpha + beta * n <= n for n in (8192, 16384))
        assert alpha % 1024 == 0 and -2048 <= alpha <= 8192
    spans = [a + 16384 * b for a, b in rules]
    assert spans == sorted(spans)
    with pytest.raises(ValueError, match="no span of alphas"):
        candidates([64], alphas=[0.0], betas=[0.0])


def test_runtime_spans():
    # 64 ceil(max(floor(alpha + beta N), 128) / 64), N = 1000 + 24
    spans = runtime_spans([0.0, -100.0, 0.0, 500.0], [0.0, 0.5, 1.0, 0.25], 1000, 24)
    assert spans.tolist() == [128, 448, 1024, 768]
    assert runtime_spans([0.0], [0.3], 90).tolist() == [90]


# --- influence


def test_influence_is_the_first_order_change_of_masking():
    weights, grad = causal_weights(2, n=7), rand(2, 7, 7, seed=1)
    found = influence(weights, grad)
    for h, i in product(range(2), range(7)):
        for j in range(i + 1):
            other = weights[h, i].clone()
            other[j] = 0
            other = other / other.sum() if i else other
            want = (grad[h, i] * (other - weights[h, i])).sum()
            torch.testing.assert_close(found[h, i, j], want)
    assert bool((found.triu(1) == 0).all())


def test_influence_predicts_the_loss_of_really_masking_a_key():
    """The loss of a small network, with the key masked and the row's softmax taken again."""
    q, k, v, target = (
        rand(1, 1, 6, 4),
        rand(1, 1, 6, 4, seed=1),
        rand(1, 1, 6, 3, seed=2),
        rand(6, 3),
    )
    v = v * 1e-4  # small values: the change is first order
    scores = (q @ k.mT / 2)[0, 0].masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)

    def loss(weights):
        return ((weights @ v[0, 0] + 0.5).sin() * target).sum()

    weights = scores.softmax(-1).requires_grad_()
    (grad,) = torch.autograd.grad(loss(weights), weights)
    found, base = influence(weights.detach(), grad), loss(weights).detach()
    for i, j in ((1, 0), (3, 3), (5, 2)):
        masked = scores.clone()
        masked[i, j] = -torch.inf
        change = loss(masked.softmax(-1)) - base
        torch.testing.assert_close(found[i, j], change, rtol=1e-3, atol=1e-12)


def test_single_keys_and_saturated_rows_are_finite():
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = influence(weights, torch.tensor([[2.0, 5.0], [3.0, 7.0]]))
    assert found.tolist() == [[-2.0, 0.0], [-3.0, 0.0]]


def test_blocks_are_sums_and_absolute_values_come_where_they_are_named():
    weights, grad = causal_weights(3, n=10), rand(3, 10, 10, seed=1)
    each = influence(weights, grad)
    for kind, entries in (("signed", each), ("block", each), ("entry", each.abs())):
        got = block_influence(weights, grad, 4, kind)
        assert got.shape == (3, 3, 3)
        for a, b in product(range(3), range(3)):
            want = entries[:, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4].sum((1, 2))
            torch.testing.assert_close(got[:, a, b], want.abs() if kind == "block" else want)


@pytest.mark.parametrize("kind", ["signed", "block", "entry"])
def test_the_influence_of_a_call_is_that_of_its_dense_weights(kind, monkeypatch):
    monkeypatch.setattr("regard.sparse.moa_profile._STRIP", 200)
    q, k, v = rand(2, 4, 13, 5), rand(2, 2, 13, 5, seed=1), rand(2, 2, 13, 6, seed=2)
    q.requires_grad_()
    out = attend(q, k, v, mask=Causal())
    target = rand(*out.shape, seed=3)
    grad_out = torch.autograd.grad((out.sin() * target).sum(), out, retain_graph=True)[0]
    got = call_influence(q, k, v, grad_out, Causal(), 5**-0.5, 4, kind)
    scores = q.detach() @ k.repeat_interleave(2, 1).mT / 5**0.5
    weights = scores.masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf).softmax(-1)
    weights.requires_grad_()
    dense = weights @ v.repeat_interleave(2, 1)
    (grad,) = torch.autograd.grad((dense.sin() * target).sum(), weights)
    want = block_influence(weights.detach(), grad, 4, kind).unflatten(1, (2, 2)).sum((0, 2))
    torch.testing.assert_close(got, want)


def test_losses_count_what_is_masked():
    blocks, rules = rand(2, 3, 5, 5), [(0.0, 1.0), (0.0, 0.0), (8.0, 0.0)]
    found = Influence(blocks, 20, 4).losses(rules)
    assert bool((found[..., 0] == 0).all())
    for layer, head, (rule, band) in product(range(2), range(3), ((1, 1), (2, 2))):
        want = sum(
            blocks[layer, head, a, b]
            for a, b in product(range(5), range(5))
            if 0 < b <= a and a - b >= band
        )
        torch.testing.assert_close(found[layer, head, rule], want)
    layout = moa_layout(*zip(*rules, strict=True), 5, 4)
    torch.testing.assert_close(rule_losses(blocks, layout), found)


def test_attention_with_spans_is_its_mask():
    q, k, v = rand(2, 4, 5, 6), rand(2, 2, 33, 6, seed=1), rand(2, 2, 33, 3, seed=2)
    got = moa_attention(q, k, v, [7, 20], sinks=4)
    for h in range(4):
        mask = Causal() & (SlidingWindow((2, 15)[h // 2]) | Sinks(4))
        kv = (x[:, h // 2 : h // 2 + 1] for x in (k, v))
        torch.testing.assert_close(got[:, h : h + 1], attend(q[:, h : h + 1], *kv, mask=mask))
    torch.testing.assert_close(
        moa_attention(q, k, v, [34, 99], sinks=1), attend(q, k, v, mask=Causal())
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: moa_layout([0.0], [1.0, 0.5], 4), r"alpha is \(1,\), but beta \(2,\)"),
        (lambda: moa_layout([0.0], [1.0], 4, block=0), "block must be an integer >= 1"),
        (lambda: candidates([]), "must be positive"),
        (lambda: SinkBands((0,)), "bands must be integers >= 1"),
        (lambda: SinkBands((1,), sinks=-1), "sinks must be an integer >= 0"),
        (lambda: influence(torch.ones(2, 2), torch.ones(2, 3)), r"grad is \(2, 3\)"),
        (lambda: block_influence(torch.ones(2, 2), torch.ones(2, 2), 2, "sum"), "kind must be one"),
        (lambda: moa_attention(*(rand(1, 2, 4, 3),) * 3, [9]), "one for each of 2 key heads"),
        (lambda: moa_attention(*(rand(1, 2, 4, 3),) * 3, [9, 3], sinks=3), "larger than sinks=3"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_benchmark_counts_growth_and_memory():
    slopes = [
        [float(x) for x in re.findall(r"N\^([\d.]+\d)", one["note"])]
        for one in benchmark.growth(sizes=(8192, 16384, 32768))
    ]
    assert 1.8 < slopes[0][0] < 2.1 and slopes[0][1] == 1.0
    assert 0.95 < slopes[1][0] < 1.1 and slopes[1][1] == 0.0
