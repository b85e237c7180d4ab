"""Faster neighbourhood attention: the fused algorithm, the unfused pair, the figures of its claim."""

from __future__ import annotations

import math

import pytest
import torch

from regard.patterns.fna import fused_na, na_av, na_qk
from regard.patterns.gna import simulate_tiles
from regard.patterns.neighborhood import Neighborhood

from .test_neighborhood import CONFIGS, by_hand, dense, qkv

PLAIN = [(grid, w, (1,) * len(grid), d, c) for grid, w, _, d, c in CONFIGS]


@pytest.mark.parametrize("config", PLAIN, ids=str)
def test_every_form_equals_the_rule_in_float64(config):
    grid, window, _, dilation, causal = config
    q, k, v = qkv(grid, 4, 2)
    out, lse = dense(q, k, v, by_hand(*config))
    axes = len(grid)
    tiles = [
        (),
        ((4,) * axes, (3,) * axes),
        ((1,) * axes, (100,) * axes),
        ((100,) * axes, (2,) * axes),
    ]
    for tile in tiles:
        got = fused_na(q, k, v, window, dilation, causal, *tile, return_lse=True)
        torch.testing.assert_close(got[0], out)
        torch.testing.assert_close(got[1], lse)
    scores = na_qk(q, k, window, dilation, causal)
    assert scores.shape == (2, 4, *grid, math.prod(window))
    torch.testing.assert_close(scores.logsumexp(-1).movedim(1, -1), lse)
    torch.testing.assert_close(na_av(scores.softmax(-1), v, window, dilation, causal), out)


def test_gradients_of_every_form():
    config = ((5, 6), (3, 2), (1, 1), (1, 2), (False, True))
    grid, window, _, dilation, causal = config
    inputs = [x[:1].requires_grad_() for x in qkv(grid, 2, 1, width=3)]
    want = torch.autograd.grad(dense(*inputs, by_hand(*config))[0].square().sum(), inputs)

    def unfused(q, k, v):
        weights = na_qk(q, k, window, dilation, causal).softmax(-1)
        return na_av(weights, v, window, dilation, causal)

    for fn in (
        unfused,
        lambda *x: fused_na(*x, window, dilation, causal),
        lambda *x: fused_na(*x, window, dilation, causal, (2, 3), (2, 2)),
    ):
        got = torch.autograd.grad(fn(*inputs).square().sum(), inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_unfused_with_strides_and_bias():
    grid, window, stride = (7, 8), (5, 3), (2, 3)
    q, k, v = qkv(grid)
    scores = na_qk(q, k, window, stride=stride, scale=0.2)
    out = na_av(scores.softmax(-1), v, window, stride=stride)
    allowed = by_hand(grid, window, stride, (1, 1), (False, False))
    torch.testing.assert_close(out, dense(q, k, v, allowed, scale=0.2)[0])
    table = torch.randn(2, 5, 5, dtype=torch.float64)
    added = na_qk(q, k, 3, rpb=table) - na_qk(q, k, 3)
    # A corner's window begins at itself, a middle one around it.
    assert torch.allclose(added[0, 1, 0, 0].view(3, 3), table[1, 2:, 2:])
    assert torch.allclose(added[0, 1, 3, 3].view(3, 3), table[1, 1:4, 1:4])
    assert torch.allclose(added[0, 1, 6, 7].view(3, 3), table[1, :3, :3])


def test_half_precision_sums_in_single():
    q, k, v = (x.bfloat16() for x in qkv((12, 12)))
    for tile in ((), ((4, 4), (4, 4))):
        got = fused_na(q, k, v, 5, 1, False, *tile)
        want = fused_na(q.double(), k.double(), v.double(), 5)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


def test_tiles_of_the_paper_beat_rows():
    """64 x 64, window 16: square tiles visit 1 of 8.46, rows 1 of 4.0; the window allows 16."""
    for window, square, rows in ((16, 8.46, 4.0), (7, 8.46, 9.14)):
        one = simulate_tiles((64, 64), window, 1, (8, 8), (8, 8)).speedup
        other = simulate_tiles((64, 64), window, 1, (1, 64), (1, 64)).speedup
        assert one == pytest.approx(square, abs=0.005) and other == pytest.approx(rows, abs=0.005)
    tiled = Neighborhood((64, 64), 16).layout(4096, block=64)
    assert 1 / tiled.density == pytest.approx(8.46, abs=0.005)


def test_listed_pairs_grow_linearly():
    """From 4k to 64k tokens; smaller grids gain from their borders."""
    sizes = (4096, 16384, 65536)
    for grid in (lambda n: (n,), lambda n: (math.isqrt(n),) * 2):
        masks = [Neighborhood(grid(n), 16 if len(grid(n)) == 2 else 256) for n in sizes]
        listed = [m.layout(m.points, block=(128, 64)).listed_pairs() for m in masks]
        slope = math.log(listed[-1] / listed[0]) / math.log(sizes[-1] / sizes[0])
        assert slope == pytest.approx(1, abs=0.08)


def test_bad_input_is_named():
    q, k, v = qkv((6, 5))
    for call, words in (
        (lambda: fused_na(q, k, v, 3, q_tile=(2, 2)), "come together"),
        (lambda: fused_na(q, k, v, 3, q_tile=(2,), kv_tile=(2, 2)), "q_tile must have 2 sides"),
        (lambda: na_qk(q, k[:, :4], 3), "k has shape"),
        (lambda: na_av(torch.ones(2, 2, 6, 5, 8), v, 3), "weights have shape"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
