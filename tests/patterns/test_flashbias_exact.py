"""Exact factors against the formulas of the biases, written pair by pair; their gradients too."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regard import Causal, LowRankBias, attend
from regard.patterns.flashbias import (
    alibi_factors,
    cosine_factors,
    factored_bias_attention,
    group_factors,
    haversine_factors,
    join_factors,
    multiply_channels,
    polynomial_factors,
    sqdist_factors,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(factors):
    return factors[0] @ factors[1].transpose(-1, -2)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_of_coordinates_are_those_of_the_distances(dims):
    xq, xk = rand(1, 1, 5, dims).requires_grad_(), rand(1, 1, 7, dims, seed=1).requires_grad_()
    w = rand(1, 2, 5, 1, seed=2).abs().requires_grad_()
    q, k, v = rand(1, 2, 5, 4), rand(1, 2, 7, 4, seed=3), rand(1, 2, 7, 4, seed=4)
    pull = rand(1, 2, 5, 4, seed=5)
    got = factored_bias_attention(q, k, v, *sqdist_factors(xq, xk, w))
    bias = -w * (xq[..., :, None, :] - xk[..., None, :, :]).square().sum(-1)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(1, 2, 5, 7))
    torch.testing.assert_close(got, want)
    leaves = (xq, xk, w)
    for a, b in zip(
        torch.autograd.grad((got * pull).sum(), leaves),
        torch.autograd.grad((want * pull).sum(), leaves),
        strict=True,
    ):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b)
    shared = rand(6, dims, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: product(sqdist_factors(x, x)), (shared,))


def test_polynomials():
    tq, tk, c = rand(5), rand(7, seed=1), rand(3, 4, seed=2)
    d = tk[None] - tq[:, None]
    want = sum(c[:, p, None, None] * d**p for p in range(4))
    factors = polynomial_factors(tq, tk, c)
    assert factors[0].shape == (3, 5, 4) and factors[1].shape == (7, 4)
    torch.testing.assert_close(product(factors), want)
    assert torch.equal(product(polynomial_factors(tq, tk, c[0, :1])), c[0, 0].expand(5, 7))
    # One degree is ALiBi, two a squared distance.
    i = torch.arange(6.0)
    slope = 0.5 ** torch.arange(1, 9)
    linear = polynomial_factors(i, i, torch.stack([0 * slope, slope], -1))
    torch.testing.assert_close(product(linear), product(alibi_factors(6, 6, 8))[0])
    squares = polynomial_factors(tq, tk, torch.tensor([0.0, 0.0, -1.0]).double())
    torch.testing.assert_close(product(squares), product(sqdist_factors(tq[:, None], tk[:, None])))
    with pytest.raises(ValueError, match="coefficients is empty"):
        polynomial_factors(tq, tk, c[:, :0])


def test_cosines():
    xq, xk, f, w = rand(5, 2), rand(7, 2, seed=1), rand(4, 2, seed=2), rand(4, seed=3)
    want = torch.zeros(5, 7).double()
    for one, frequency in zip(w, f, strict=True):
        want += one * torch.cos((xq[:, None] - xk[None]) @ frequency)
    factors = cosine_factors(xq, xk, f, w)
    assert factors[0].shape[-1] == 8
    torch.testing.assert_close(product(factors), want)
    assert product(cosine_factors(xq, xk, f, rand(2, 1, 4))).shape == (2, 5, 7)
    with pytest.raises(ValueError, match=r"frequencies has shape \(4, 2\), expected"):
        cosine_factors(xq[:, :1], xk, f)


def test_haversine_is_the_great_circle():
    at = (2 * torch.rand(9, 2, generator=torch.Generator().manual_seed(0)).double() - 1) * (
        torch.tensor([math.pi / 2, math.pi])
    )
    lat, lon = at[:, 0], at[:, 1]
    cosine = (
        lat.sin()[:, None] * lat.sin() + lat.cos()[:, None] * lat.cos() * (lon[:, None] - lon).cos()
    )
    theta = cosine.clamp(-1, 1).acos()
    w = rand(3, 9, 1).abs()
    factors = haversine_factors(at, at, w)
    assert factors[0].shape == (3, 9, 4)
    torch.testing.assert_close(product(factors), -w * (theta / 2).sin().square())
    with pytest.raises(ValueError, match="xq has 3 coordinates"):
        haversine_factors(rand(2, 3), at)


def test_groups():
    table, gq, gk = rand(2, 3, 3), torch.tensor([0, 2, 1, 2]), torch.tensor([1, 1, 0, 2, 0])
    torch.testing.assert_close(product(group_factors(table, gq, gk)), table[:, gq][:, :, gk])
    with pytest.raises(ValueError, match=r"groups_k must be a vector of numbers in \[0, 3\)"):
        group_factors(table, gq, gk + 1)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., G, G\)"):
        group_factors(table[:, :2], gq, gk)


def test_joined_channels_are_the_sum():
    at, w = rand(6, 2), rand(2, 4, 6, 1, seed=1)
    kinds = torch.tensor([0, 1, 0, 1, 1, 0])
    parts = [
        alibi_factors(6, 6, 4),
        sqdist_factors(at, at, w),
        group_factors(rand(4, 2, 2), kinds, kinds),
    ]
    joined = join_factors(*parts)
    assert joined[0].shape == (2, 4, 6, 2 + 4 + 2)
    torch.testing.assert_close(product(joined), sum(product(p).double() for p in parts))
    q, k, v = rand(2, 4, 6, 8), rand(2, 4, 6, 8, seed=1), rand(2, 4, 6, 8, seed=2)
    got = attend(q, k, v, mask=Causal(), bias=LowRankBias(*joined))
    bias = product(joined).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    with pytest.raises(ValueError, match="at least one pair"):
        join_factors()


def test_multiplied_scores():
    q, k, v = rand(2, 3, 5, 4), rand(2, 3, 7, 4, seed=1), rand(2, 3, 7, 4, seed=2)
    at_q, at_k = torch.arange(5.0).double()[:, None], torch.arange(7.0).double()[:, None]
    factors = cosine_factors(at_q, at_k, torch.tensor([[0.3]]).double())
    wide_q, wide_k = multiply_channels(q, k, *factors)
    assert wide_q.shape == (2, 3, 5, 8)
    weight = (0.5 * (q @ k.transpose(-1, -2)) * (0.3 * (at_q - at_k.T)).cos()).softmax(-1)
    torch.testing.assert_close(attend(wide_q, wide_k, v, scale=0.5), weight @ v)
    with pytest.raises(ValueError, match="phi_q has rank 2, phi_k has 1"):
        multiply_channels(q, k, factors[0], factors[1][:, :1])
