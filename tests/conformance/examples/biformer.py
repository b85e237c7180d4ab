"""BiFormer: attention of chosen regions, the module, the block."""

from __future__ import annotations

import torch
from torch import nn

from regard.sparse.biformer import BiLevelRoutingAttention, region_attend
from regard.sparse.biformer_model import BiFormerBlock, GlobalAttention, biformer
from tests.conformance import AttentionExample, ModuleExample

GRIDS = {1: (1, 1), 12: (3, 4), 35: (5, 7), 64: (8, 8)}
REGION, KV_REGION = (2, 3), (2, 2)


def _regions(grid, region):
    return [-(-side // step) for side, step in zip(grid, region, strict=True)]


def _chosen(n, m):
    """Some regions of the keys for each region of the queries, int64 `(1, R, K)`."""
    (a, b), (c, d) = _regions(GRIDS[n], REGION), _regions(GRIDS[m], KV_REGION)
    step = torch.arange(a * b)[:, None]
    return ((step * 2 + torch.arange(min(3, c * d))) % (c * d))[None]


def _attend(q, k, v):
    n, m = q.shape[2], k.shape[2]
    q, (k, v) = q.unflatten(2, GRIDS[n]), (x.unflatten(2, GRIDS[m]) for x in (k, v))
    return region_attend(q, k, v, _chosen(n, m), REGION, kv_region_size=KV_REGION).flatten(2, 3)


def _definition(q, k, v):
    """Dense, with the mask pixel by pixel."""
    n, m = q.shape[2], k.shape[2]

    def region_of(count, region):
        at, columns = torch.arange(count), GRIDS[count][1]
        wide = _regions(GRIDS[count], region)[1]
        return at // columns // region[0] * wide + at % columns // region[1]

    rows = _chosen(n, m)[0][region_of(n, REGION)]
    mask = (rows[:, :, None] == region_of(m, KV_REGION)).any(1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def image(*shape):
    def inputs(dtype):
        return (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),)

    return inputs


EXAMPLES = [
    AttentionExample(
        _attend,
        _definition,
        lengths=((1, 1), (12, 12), (64, 64), (35, 35), (12, 35)),
        bad=(
            (
                lambda: region_attend(
                    *[torch.zeros(1, 1, 2, 2, 3)] * 3, torch.ones(1, 3, 1), (1, 1)
                ),
                "index must be .batch, 4, K",
            ),
        ),
    ),
    ModuleExample(
        lambda: BiLevelRoutingAttention(8, heads=2, n_win=2, topk=2),
        image(2, 8, 4, 6),
        bad=(
            (lambda: BiLevelRoutingAttention(8, heads=3), "3 heads do not divide dim 8"),
            (
                lambda: BiLevelRoutingAttention(8, topk=0),
                "n_win and topk must be >= 1, got 7 and 0",
            ),
            (
                lambda: BiLevelRoutingAttention(8, n_win=2)(torch.zeros(1, 4, 4, 4)),
                "expected .batch, 8, rows, columns",
            ),
            (
                lambda: BiLevelRoutingAttention(8, n_win=2, topk=5)(torch.zeros(1, 8, 4, 4)),
                r"topk must lie in \[1, 4\], got 5",
            ),
        ),
    ),
    ModuleExample(
        lambda: BiLevelRoutingAttention(4, heads=1, n_win=2, topk=3, side_dwconv=0, scale=0.5),
        image(1, 4, 5, 7),
        bad=((lambda: BiLevelRoutingAttention(4, heads=1, side_dwconv=2), "must be odd"),),
    ),
    ModuleExample(
        lambda: BiFormerBlock(8, heads=2, topk=2, n_win=2, mlp_ratio=2),
        image(1, 8, 4, 4),
        bad=((lambda: BiFormerBlock(8, drop_path=-0.1), "drop_path must lie in"),),
    ),
    ModuleExample(
        lambda: BiFormerBlock(8, topk=None, mlp_ratio=2),
        image(2, 8, 3, 2),
        bad=(
            (lambda: GlobalAttention(8, side_dwconv=4), "side_dwconv must be odd, got 4"),
            (lambda: GlobalAttention(9), "8 heads do not divide dim 9"),
            (lambda: biformer("large"), "variant must be one of tiny, small, base, got 'large'"),
        ),
    ),
]
