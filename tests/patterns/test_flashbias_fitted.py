"""Factors by decomposition and by training: what they keep, and that they learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import Causal
from regard.patterns.flashbias import (
    NeuralBiasFactors,
    factored_bias_attention,
    pair_features,
    rank_curve,
    svd_factors,
    train_factors,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rank_curve_against_attention_with_the_truncated_bias():
    q, k, v = (rand(2, 3, 6, 4, seed=s).double() for s in range(3))
    bias = rand(3, 6, 6, seed=3).double()
    curve = rank_curve(bias, q, k, v, (1, 2, 6), mask=Causal())
    u, s, vh = torch.linalg.svd(bias)
    below = torch.ones(6, 6).tril().bool()

    def attention(b):
        b = b.masked_fill(~below, -torch.inf).expand(2, 3, 6, 6)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=b)

    exact = attention(bias)
    for point in curve:
        r = point.rank
        low = (u[..., :r] * s[:, None, :r]) @ vh[:, :r]
        share = (s[:, :r].square().sum(-1) / s.square().sum(-1)).min()
        assert point.energy == pytest.approx(share.item())
        assert point.scores == pytest.approx(((low - bias).norm() / bias.norm()).item(), abs=1e-9)
        assert point.worst_score == pytest.approx((low - bias).abs().max().item(), abs=1e-9)
        gap = (attention(low) - exact).norm() / exact.norm()
        assert point.output == pytest.approx(gap.item(), abs=1e-9)
    assert curve[0].scores > curve[1].scores > 1e-3
    assert curve[-1].output < 1e-9
    # A score's error is not the output's: rank 1 leaves far more of one than of the other.
    assert abs(curve[0].output - curve[0].scores) > 0.05


def test_rank_curve_defaults_and_limits():
    x = rand(1, 1, 12, 4)
    assert [p.rank for p in rank_curve(rand(12, 12), x, x, x)] == [1, 2, 4, 8, 12]
    (zero,) = rank_curve(torch.zeros(12, 12), x, x, x, (1,))
    assert (zero.energy, zero.scores) == (1.0, 0.0) and zero.output < 1e-6
    with pytest.raises(ValueError, match=r"ranks must lie in 1\.\.12, got 13"):
        rank_curve(rand(12, 12), x, x, x, (13,))


def _distances(count, n, seed):
    """Points on a line, `-|x_i - x_j|` for one head and `-(x_i - x_j)^2` for another."""
    x = 2 * torch.rand(count, n, 1, generator=torch.Generator().manual_seed(seed)) - 1
    gap = x - x.transpose(1, 2)
    features = torch.cat([x, torch.ones_like(x)], -1)
    return features, torch.stack([-gap.abs(), -gap.square()], 1)


def test_training_learns_what_it_has_not_seen():
    z, bias = _distances(32, 24, 0)
    state = torch.random.get_rng_state()

    def train():
        return train_factors(
            z,
            z,
            bias,
            rank=8,
            hidden=64,
            steps=300,
            lr=1e-2,
            samples=16,
            points=16,
            generator=torch.Generator().manual_seed(0),
        )

    network, losses = train()
    assert losses.shape == (300,)
    assert losses[-20:].mean() < losses[:20].mean() / 30
    fresh, unseen = _distances(8, 40, 1)
    phi_q, phi_k = network(fresh, fresh)
    assert phi_q.shape == (8, 2, 40, 8)
    error = ((phi_q @ phi_k.transpose(-1, -2) - unseen).norm() / unseen.norm()).item()
    assert error < 0.12
    v = rand(8, 2, 40, 4)
    want = F.scaled_dot_product_attention(v, v, v, attn_mask=unseen)
    got = factored_bias_attention(v, v, v, phi_q, phi_k)
    assert ((got - want).norm() / want.norm()).item() < 0.1
    # The generator is the only source of randomness.
    again, same = train()
    assert torch.equal(losses, same)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True)
    )
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_goes_on_and_its_scale_is_free():
    z, bias = _distances(8, 10, 0)
    make = {"rank": 4, "hidden": 16, "steps": 60, "lr": 5e-3}
    network, first = train_factors(z, z, 1e3 * bias, **make, generator=torch.Generator())
    same, second = train_factors(z, z, 1e3 * bias, **make, network=network)
    assert same is network and second[-1] < first[-1] < first[0]
    assert train_factors(z.double(), z.double(), bias.double(), rank=2, steps=1)[1].dtype == (
        torch.float64
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": rand(2, 5, 5)}, r"bias \(2, 5, 5\), expected"),
        ({"zk": rand(2, 6, 3)}, r"examples of 5 x 5, zq \(2, 5\), zk \(2, 6\)"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"points": -1}, "points must be >= 1, got -1"),
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"network": NeuralBiasFactors(3, 3, 1, 5)}, "has 1 heads and rank 5, expected 1 and 2"),
    ],
)
def test_bad_training_is_named(change, words):
    good = {"zq": rand(2, 5, 3), "zk": rand(2, 5, 3), "bias": rand(2, 1, 5, 5), "rank": 2}
    with pytest.raises(ValueError, match=words):
        train_factors(**{**good, **change})


def test_pair_features():
    pair, single = rand(2, 4, 4, 3), rand(2, 4, 5, seed=1)
    zq, zk = pair_features(pair, single)
    assert zq.shape == zk.shape == (2, 4, 8)
    torch.testing.assert_close(zq[1, 2, :3], sum(pair[1, 2, j] for j in range(4)) / 4)
    torch.testing.assert_close(zk[1, 2, :3], sum(pair[1, i, 2] for i in range(4)) / 4)
    assert torch.equal(zq[..., 3:], single) and torch.equal(zk[..., 3:], single)
    with pytest.raises(ValueError, match=r"expected \(B, N, N, C\)"):
        pair_features(pair[:, :, :3], single[:, :3])


def test_a_window_needs_rank_5_and_a_random_table_120():
    at = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0))
    offset = (at[:, None] - at[None] + 11).long()
    random = rand(23, 23)[offset[..., 0], offset[..., 1]]
    assert svd_factors(-torch.cdist(at, at))[0].shape[-1] == 5
    assert svd_factors(random)[0].shape[-1] == 120
