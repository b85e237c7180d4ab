"""FlashBias against PyTorch's attention with the dense bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import ALiBi, Causal, SlidingWindow, attend
from regard.patterns.flashbias import (
    NeuralBiasFactors,
    alibi_factors,
    factored_bias_attention,
    sqdist_factors,
    svd_factors,
)


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def dense(q, k, v, bias, allowed=None, scale=None):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if allowed is not None:
        bias = bias.masked_fill(~allowed, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


@pytest.mark.parametrize("shape_q", [(2, 4, 9, 3), (4, 9, 3), (1, 1, 9, 3), (9, 3)])
@pytest.mark.parametrize("shape_k", [(2, 4, 15, 3), (1, 4, 15, 3), (15, 3)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_attention_with_the_dense_bias(shape_q, shape_k, kv_heads):
    q, k, v = rand(2, 4, 9, 8), rand(2, kv_heads, 15, 8, seed=1), rand(2, kv_heads, 15, 6, seed=2)
    phi_q, phi_k = rand(*shape_q, seed=3), rand(*shape_k, seed=4)
    bias = phi_q @ phi_k.transpose(-1, -2)
    got = factored_bias_attention(q, k, v, phi_q, phi_k)
    torch.testing.assert_close(got, dense(q, k, v, bias))
    i, j = torch.arange(6, 15)[:, None], torch.arange(15)[None]
    got = factored_bias_attention(q, k, v, phi_q, phi_k, causal=True, scale=0.3)
    torch.testing.assert_close(got, dense(q, k, v, bias, j <= i, scale=0.3))
    got = factored_bias_attention(q, k, v, phi_q, phi_k, causal=True, mask=SlidingWindow(4))
    torch.testing.assert_close(got, dense(q, k, v, bias, (j <= i) & (j >= i - 4)))


def test_gradients_equal_those_through_the_dense_bias():
    leaves = [
        x.requires_grad_()
        for x in (
            rand(1, 2, 5, 4),
            rand(1, 2, 7, 4),
            rand(1, 2, 7, 4),
            rand(2, 5, 3),
            rand(2, 7, 3),
        )
    ]
    q, k, v, phi_q, phi_k = leaves
    weight = rand(1, 2, 5, 4, seed=9)
    got = torch.autograd.grad((factored_bias_attention(*leaves) * weight).sum(), leaves)
    want = dense(q, k, v, phi_q @ phi_k.transpose(-1, -2))
    for a, b in zip(got, torch.autograd.grad((want * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_zero_factors_are_plain_attention():
    q, k, v = rand(1, 2, 5, 4), rand(1, 2, 7, 4, seed=1), rand(1, 2, 7, 4, seed=2)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    got = factored_bias_attention(q, k, v, zero.expand(5, 3), zero.expand(7, 3))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("origin", [None, 0, 7])
def test_alibi_factors(origin):
    phi_q, phi_k = alibi_factors(5, 12, 8, origin=origin)
    assert phi_q.shape == (1, 8, 5, 2) and phi_k.shape == (1, 8, 12, 2)
    slopes = 0.5 ** torch.arange(1, 9)
    want = slopes[:, None, None] * (torch.arange(12)[None] - torch.arange(7, 12)[:, None])
    torch.testing.assert_close((phi_q @ phi_k.transpose(-1, -2))[0], want)
    moved, _ = alibi_factors(5, 12, 8, offset=0, origin=origin)
    first = (moved @ phi_k.transpose(-1, -2))[0]
    torch.testing.assert_close(first[:, 0], slopes[:, None] * torch.arange(12))


def test_alibi_in_half_precision_attends_to_the_right_keys():
    # Far into a sequence, bfloat16 positions would be off by up to 16 keys.
    n = 3000
    q, k = torch.zeros(1, 8, 4, 8, dtype=torch.bfloat16), torch.zeros(1, 8, n, 8).bfloat16()
    v = torch.randn(1, 8, n, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = attend(q, k, v, mask=Causal(), bias=ALiBi.for_heads(8))
    i, j = torch.arange(n - 4, n)[:, None], torch.arange(n)[None]
    bias = 0.5 ** torch.arange(1, 9)[:, None, None] * (j - i).float()
    want = dense(q.float(), k.float(), v.float(), bias, j <= i)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("center", [True, False])
def test_squared_distances(dims, center):
    xq, xk, w = rand(2, 1, 5, dims), rand(2, 1, 7, dims, seed=1), rand(2, 4, 5, 1, seed=2).abs()
    phi_q, phi_k = sqdist_factors(xq, xk, w, center=center)
    assert phi_q.shape == (2, 4, 5, dims + 2)
    want = -w * torch.cdist(xq, xk).square()
    torch.testing.assert_close(phi_q @ phi_k.transpose(-1, -2), want)
    phi_q, phi_k = sqdist_factors(xq, xk)
    torch.testing.assert_close(phi_q @ phi_k.transpose(-1, -2), -torch.cdist(xq, xk).square())


def test_centering_keeps_distances_far_from_the_origin():
    xq, xk = rand(5, 3).float() + 3000, rand(7, 3, seed=1).float() + 3000
    phi_q, phi_k = sqdist_factors(xq, xk)
    want = -torch.cdist(xq.double(), xk.double()).square()
    assert ((phi_q @ phi_k.T).double() - want).abs().max() < 1e-3


def test_svd_factors():
    bias = rand(3, 6, 9)
    phi_q, phi_k = svd_factors(bias, rank=6)
    torch.testing.assert_close(phi_q @ phi_k.transpose(-1, -2), bias)
    phi_q, phi_k = svd_factors(bias, energy=1.0)
    torch.testing.assert_close(phi_q @ phi_k.transpose(-1, -2), bias)
    # The error of rank R is the energy left out (Eckart-Young).
    phi_q, phi_k = svd_factors(bias, rank=2)
    left = (bias - phi_q @ phi_k.transpose(-1, -2)).square().sum((-1, -2))
    torch.testing.assert_close(left, torch.linalg.svdvals(bias)[:, 2:].square().sum(-1))
    low = rand(4, 20, 2) @ rand(4, 2, 30, seed=1)
    assert svd_factors(low)[0].shape[-1] == 2
    assert svd_factors(torch.zeros(4, 4))[0].shape[-1] == 1
    # The spec's example: a smooth table on a 12 x 12 window keeps 99.5 % of its energy in rank 5.
    at = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0))
    assert svd_factors(-torch.cdist(at, at))[0].shape[-1] == 5


def test_networks_learn_a_bias():
    torch.manual_seed(0)
    at = torch.rand(1, 12, 2)
    bias = -torch.cdist(at, at).square()[:, None].expand(1, 2, 12, 12)
    # Networks without biases are odd functions, so the features hold a constant.
    at = torch.cat([at, torch.ones(1, 12, 1)], -1)
    net = NeuralBiasFactors(3, 3, heads=2, rank=4, hidden=16)
    phi_q, phi_k = net(at, at)
    assert phi_q.shape == phi_k.shape == (1, 2, 12, 4)
    assert all(p.dim() == 2 for p in net.parameters()), "the paper's networks have no biases"
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    first = net.loss(at, at, bias).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = net.loss(at, at, bias)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: factored_bias_attention(q, q, q, rand(5, 2), rand(5, 3)), "phi_q has rank 2"),
        (lambda q: factored_bias_attention(q, q, q, rand(7, 2), rand(5, 2)), "expected 5 rows"),
        (lambda q: factored_bias_attention(q, q, q, rand(3, 5, 2), rand(5, 2)), "heads=3"),
        (lambda q: factored_bias_attention(q, q, q, rand(5, 2), rand(4, 2)), "4 keys"),
        (lambda q: alibi_factors(3, 3, 4, slopes=rand(3)), r"slopes has shape \(3,\)"),
        (lambda q: sqdist_factors(rand(3, 2), rand(3, 3)), "xq has 2 coordinates"),
        (lambda q: svd_factors(rand(3, 4), rank=4), r"rank must lie in 1\.\.3"),
        (lambda q: svd_factors(rand(3, 4), energy=0.0), r"energy must lie in \(0, 1\]"),
        (lambda q: svd_factors(rand(3, 4), energy=0.5, rank=2), "not both"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call(rand(1, 2, 5, 4))
