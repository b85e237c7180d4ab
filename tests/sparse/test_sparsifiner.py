"""Sparsifiner's predictor and attention against the rule row by row, limiting cases, and the lists."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regard.sparse.sparsifiner import (
    ConnectivityPredictor,
    SparsifinerAttention,
    choose_keys,
    connected_attend,
    sparse_basis,
    sparse_coefficients,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predictor(heads, n, width=6, seed=0, **options):
    torch.manual_seed(seed)
    made = ConnectivityPredictor(heads * width, heads, n, **options).double()
    # as large as after training, so that thresholds cut between them
    for weight in (made.proj_n, made.proj_back_n):
        torch.nn.init.normal_(weight, std=0.05)
    return made


def rule(p, q, k, *, keep, topk, signed):
    """Section 3.2 one query at a time: scores, and the chosen keys."""
    b, h, n, _ = q.shape
    score, chosen = torch.zeros(b, h, n - 1, n, dtype=q.dtype), torch.zeros(b, h, n, n)
    for e in range(b):
        for head in range(h):
            low_k = torch.stack([p.proj_c_k(k[e, head, j]) for j in range(n)])
            pooled = [
                sum(p.proj_n[j, r] * low_k[j] for j in range(n)) for r in range(p.proj_n.shape[1])
            ]
            chosen[e, head, 0] = 1
            for i in range(1, n):
                low_q = p.proj_c_q(q[e, head, i])
                c = torch.stack([low_q @ x / math.sqrt(h) for x in pooled]).softmax(0)
                basis = p.proj_back_n
                if not signed:
                    basis = torch.where(basis.abs() > 0.02, basis.abs(), 0.0)
                    edge = c.sort(descending=True).values[min(topk, len(c)) - 1] if topk else 0.05
                    c = torch.where(c >= edge if topk else c > edge, c, 0.0)
                score[e, head, i - 1] = basis @ c
                best = score[e, head, i - 1].argsort(descending=True, stable=True)
                chosen[e, head, i, best[: math.ceil(keep * n)]] = 1
    return score, chosen.bool()


@pytest.mark.parametrize("n", [2, 9, 14])
@pytest.mark.parametrize("topk", [1, 3, 8, None])
@torch.no_grad()
def test_is_the_papers_rule_row_by_row(n, topk):
    p = predictor(2, n, keep=0.3, reduce_n=2, basis_topk=topk)
    q, k = rand(2, 2, n, 6), rand(2, 2, n, 6, seed=1)
    score, mask = p(q, k)
    want, chosen = rule(p, q, k, keep=0.3, topk=topk, signed=False)
    torch.testing.assert_close(score, want)
    assert torch.equal(mask, chosen) and (mask[:, :, 1:].sum(-1) == math.ceil(0.3 * n)).all()
    torch.testing.assert_close(p.signed(q, k), rule(p, q, k, keep=0.3, topk=topk, signed=True)[0])


@torch.no_grad()
def test_with_the_identity_as_basis_scores_are_the_low_dimensional_attention():
    p = predictor(3, 7, reduce_n=1, basis_topk=7, basis_thr=0.0)
    p.proj_n.copy_(torch.eye(7))
    p.proj_back_n.copy_(torch.eye(7))
    q, k = rand(2, 3, 7, 6), rand(2, 3, 7, 6, seed=1)
    weights = (p.proj_c_q(q) @ p.proj_c_k(k).mT / math.sqrt(3)).softmax(-1)[:, :, 1:]
    torch.testing.assert_close(p(q, k)[0], weights)
    torch.testing.assert_close(p.signed(q, k), weights)


@torch.no_grad()
def test_keeping_everything_is_a_transformers_attention():
    torch.manual_seed(0)
    layer = SparsifinerAttention(12, 9, heads=3, keep=1.0).double()
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.copy_(layer.qkv.weight)
    theirs.in_proj_bias.copy_(layer.qkv.bias)
    theirs.out_proj.load_state_dict(layer.proj.state_dict())
    x = rand(2, 9, 12)
    want, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(layer(x), want)
    dense = layer.reconstruct(x)
    torch.testing.assert_close(dense.out, want)
    torch.testing.assert_close(dense.attention, weights)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_lists_of_keys_are_the_dense_mask(n, kv_heads):
    q, k, v = rand(2, 4, n, 5), rand(2, kv_heads, n, 5, seed=1), rand(2, kv_heads, n, 3, seed=2)
    mask = rand(2, 4, n, n, seed=3) > 0.3
    mask[:, 1, n // 2] = False
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4, enable_gqa=True)
    want = want.nan_to_num().masked_fill(~mask.any(-1, keepdim=True), 0.0)
    got = connected_attend(q, k, v, mask, scale=0.4)
    torch.testing.assert_close(got, want)
    assert (got[:, 1, n // 2] == 0).all()


def test_gradients_pass_the_lists_but_not_the_choice():
    mask = rand(1, 2, 5, 5, seed=3) > 0
    mask[0, 0, 3] = False
    inputs = [rand(1, 2, 5, 3, seed=s).requires_grad_() for s in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: connected_attend(q, k, v, mask), inputs)
    torch.manual_seed(0)
    layer = SparsifinerAttention(8, 9, heads=2, reduce_n=3).double()
    layer(rand(2, 9, 8)).square().sum().backward()
    assert all(p.grad is None for p in layer.mask_predictor.parameters())
    assert layer.qkv.weight.grad.abs().sum() > 0
    found = layer.reconstruct(rand(2, 9, 8))
    found.score.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.mask_predictor.parameters())


def test_thresholds():
    c = torch.tensor([[[[0.5, 0.04, 0.05, 0.41]]]])
    assert sparse_coefficients(c, 2).tolist() == [[[[0.5, 0, 0, pytest.approx(0.41)]]]]
    assert (sparse_coefficients(c, None) > 0).tolist() == [[[[True, False, False, True]]]]
    assert (sparse_coefficients(c, None, 0.045) > 0).sum() == 3
    assert torch.equal(sparse_coefficients(c, 9), c)
    back = torch.tensor([[-0.03, 0.02], [0.021, -0.001]])
    assert (sparse_basis(back) > 0).tolist() == [[True, False], [True, False]]


def test_ties_and_empty_scores_take_the_earliest_keys():
    score = torch.zeros(1, 1, 3, 4)
    score[0, 0, 1, 2] = 1.0
    chosen = choose_keys(score, 2)[0, 0]
    assert chosen.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]


@torch.no_grad()
def test_scores_below_a_threshold_leave_rows_without_keys():
    torch.manual_seed(0)
    layer = SparsifinerAttention(8, 9, heads=2, reduce_n=3).double()
    x = rand(2, 9, 8)
    q, k, v = layer.heads_of(x)
    score, _ = layer.mask_predictor(q, k)
    edge = layer.mask_predictor.score_thr = float(score.amax(-1).median())
    _, mask = layer.mask_predictor(q, k)
    assert torch.equal(mask[:, :, 1:], score > edge) and mask[:, :, 0].all()
    empty = ~mask.any(-1)
    assert empty.any() and not empty[:, :, 1:].all()
    assert (connected_attend(q, k, v, mask)[empty] == 0).all()
    assert torch.isfinite(layer(x)).all()


@torch.no_grad()
def test_pruned_tokens_are_as_if_they_were_not_there():
    torch.manual_seed(0)
    layer = SparsifinerAttention(8, 9, heads=2, keep=0.5).double()
    torch.nn.init.normal_(layer.mask_predictor.proj_back_n, std=0.1)
    active = torch.ones(2, 9, dtype=torch.bool)
    active[0, 3:5] = False
    active[1, 2] = False
    x = rand(2, 9, 8)
    q, k, _ = layer.heads_of(x)
    before = q.clone(), k.clone()
    _, mask = layer.mask_predictor(q, k, active)
    # the authors zero q and k in place, through views
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    assert not mask[~active[:, None, None].expand_as(mask)].any()
    assert not mask.transpose(2, 3)[~active[:, None, None].expand_as(mask)].any()
    assert (mask[0, :, [1, 2, 5, 6, 7, 8]].sum(-1) == 5).all()
    out = layer(x, active)
    other = torch.where(active[..., None], x, 9.0)
    assert torch.equal(out[active], layer(other, active)[active])
    assert torch.equal(out[~active], layer.proj.bias.expand(3, 8))


def test_dtypes_and_empty_batches():
    layer = SparsifinerAttention(8, 9, heads=2)
    assert layer(torch.zeros(0, 9, 8)).shape == (0, 9, 8)
    assert layer.to(torch.bfloat16)(torch.zeros(1, 9, 8).bfloat16()).dtype == torch.bfloat16


def test_bad_input_is_named():
    layer = SparsifinerAttention(8, 9, heads=2)
    q = torch.zeros(1, 2, 9, 4)
    for call, words in (
        (lambda: ConnectivityPredictor(8, 3, 9), "3 heads do not divide dim 8"),
        (lambda: ConnectivityPredictor(8, 2, 9, keep=0.0), r"keep must lie in \(0, 1\], got 0.0"),
        (lambda: ConnectivityPredictor(8, 2, 5), "got 6 of 5 and 2 of 4"),
        (lambda: ConnectivityPredictor(8, 2, 9, basis_topk=0), "basis_topk must be >= 1, got 0"),
        (lambda: layer(torch.zeros(1, 8, 8)), r"expected \(batch, 9, 8\)"),
        (lambda: layer.mask_predictor(q, q[:, :, 1:]), "k has shape"),
        (
            lambda: layer.mask_predictor(q, q, torch.ones(1, 8, dtype=torch.bool)),
            r"active must be bool \(1, 9\), got torch.bool \(1, 8\)",
        ),
        (lambda: connected_attend(q, q, q, torch.ones(9, 9)), "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
