"""Generalized neighbourhood attention: the rule, the paper's analytical model and its figures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.core.dense import dense_attention

from regard.patterns.gna import best_tiles, end_to_end, flop_bound, simulate, simulate_tiles
from regard.patterns.neighborhood import Neighborhood, neighborhood_attention

from .test_neighborhood import by_hand

STRIDED = [
    ((14,), (6,), (4,), (1,), (False,)),
    ((19,), (5,), (5,), (2,), (True,)),
    ((9, 12), (4, 6), (4, 2), (1, 2), (False, False)),
    ((4, 6, 5), (4, 3, 2), (2, 3, 1), (1, 2, 1), (False, True, False)),
]


@pytest.mark.parametrize("config", STRIDED, ids=str)
def test_equals_the_rule_in_float64(config):
    grid, window, stride, dilation, causal = config
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, *grid, 2, 8, generator=g, dtype=torch.float64) for _ in range(3))
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    want = dense_attention(*flat, by_hand(*config))[0].transpose(1, 2).reshape(q.shape)
    for block in (None, 16):
        got = neighborhood_attention(
            q, k, v, window, stride=stride, dilation=dilation, causal=causal, block=block
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", STRIDED, ids=str)
def test_tiles_are_counted_as_a_kernel_would(config):
    """A pair of tiles is visited where the union of the windows, a box, meets the key tile."""
    grid, window, stride, dilation, causal = config
    allowed = by_hand(*config)
    found = simulate_tiles(grid, window, stride, (3,) * len(grid), (2,) * len(grid), dilation=dilation,
                           causal=causal)  # fmt: skip
    points = list(itertools.product(*(range(x) for x in grid)))

    def tile(point, side):
        residue = tuple(x % d for x, d in zip(point, dilation, strict=True))
        return residue, tuple(x // d // side for x, d in zip(point, dilation, strict=True))

    visited = set()
    for i, j in allowed.nonzero().tolist():
        visited.add((tile(points[i], 3), tile(points[j], 2)))
    # Windows of one tile leave no gap on an axis, so the union of boxes fills its bounds by axis.
    boxes = {}
    for q, k in visited:
        boxes.setdefault(q, []).append(k[1])
    count = sum(
        math.prod(max(x) - min(x) + 1 for x in zip(*keys, strict=True)) for keys in boxes.values()
    )
    assert found.visited == count
    assert flop_bound(*config) == pytest.approx(allowed.numel() / int(allowed.sum()))


def test_figures_of_the_paper():
    """FLUX at 4K and HunyuanVideo: tables of section 4."""
    flux = {"q_tile": (16, 16), "kv_tile": (16, 8), "share": 0.518}
    for stride, want in (((1, 1), 7.06), ((16, 1), 9.00), ((16, 16), 10.24)):
        found = simulate((256, 256), (80, 80), stride, **flux)
        assert found["speedup"] == pytest.approx(want, abs=0.005)
        assert found["flop_bound"] == pytest.approx(10.24)
        assert found["perfectly_block_sparse"] == (stride == (16, 16))
    assert found["end_to_end"] == pytest.approx(1.88, abs=0.005)
    video = simulate(
        (30, 48, 80), (18, 24, 24), (16, 8, 8), q_tile=(16, 8, 2), kv_tile=(2, 8, 8), share=0.607
    )
    assert video["speedup"] == pytest.approx(100 / 9) and video["perfectly_block_sparse"]
    assert video["end_to_end"] == pytest.approx(2.23, abs=0.005)


def test_the_search_finds_what_trying_finds():
    shape, window = (32, 48), (8, 12)
    found = best_tiles(shape, window, 4, q_tokens=64, kv_tokens=32)
    assert len(found) == 7 * 6
    tried = [simulate_tiles(shape, window, 4, t.q_tile, t.kv_tile) for t in found]
    assert tried == found and found[0].visited == min(t.visited for t in tried)
    assert simulate(shape, window, 4, q_tokens=64, kv_tokens=32)["visited"] == found[0].visited
    assert simulate((256, 256), 80, 16)["perfectly_block_sparse"]


def test_the_layout_is_as_dense_as_the_model_allows():
    """Perfectly block-sparse in blocks of the library too: no listed block needs its mask."""
    layout = Neighborhood((64, 64), 16, 16).layout(4096, block=(128, 64))
    assert layout.permuted and not layout.partial.any()
    assert layout.density == pytest.approx(1 / flop_bound((64, 64), 16, 16))


def test_listed_pairs_grow_linearly():
    """From 4k to 64k tokens; smaller grids gain from their borders."""
    sides = (64, 128, 256)
    for stride in (1, 8):
        listed = [
            Neighborhood((x, x), 16, stride).layout(x * x, block=(128, 64)).listed_pairs()
            for x in sides
        ]
        slope = math.log(listed[-1] / listed[0]) / math.log(sides[-1] ** 2 / sides[0] ** 2)
        assert slope == pytest.approx(1, abs=0.08)


def test_bad_input_is_named():
    for call, words in (
        (lambda: simulate_tiles((8, 8), 3, 1, (4,), (4, 4)), "q_tile must have 2 sides"),
        (lambda: simulate_tiles((8, 8), 9, 1, (4, 4), (4, 4)), "larger than the 8 positions"),
        (lambda: simulate((8, 8), 3, q_tile=(4, 4)), "come together"),
        (lambda: best_tiles((8, 8), 3, q_tokens=12), "power of two, got 12"),
        (lambda: end_to_end(1.5, 2), r"share in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
