"""Examples of HaloNet: the mask on square and other grids, the module, the bottleneck."""

from __future__ import annotations

import torch

from regard.patterns.halonet import Halo, HaloAttention, HaloBlock
from tests.conformance import MaskExample, ModuleExample


def seen(grid, block, halo, stride=1, padded=False):
    """The definition, pixel by pixel."""

    def definition(n, m):
        at = torch.arange(stride // 2, grid[0], stride), torch.arange(stride // 2, grid[1], stride)
        axes = []
        for pixels, side in zip(at, grid, strict=True):
            edge = halo if padded else 0
            keys = torch.arange(-edge, side + edge)
            start = (pixels // block * block)[:, None]
            axes.append((keys >= start - halo) & (keys < start + block + halo))
        out = torch.einsum("ab,cd->acbd", *(x.int() for x in axes)).bool()
        return out.reshape(n, m)

    return definition


def mask(grid, block, halo, stride=1, padded=False):
    halo_mask = Halo(grid, block, halo, stride, padded)
    definition = seen(grid, block, halo, stride, padded)
    return MaskExample(halo_mask, halo_mask.queries, halo_mask.keys, definition)


def image(*shape):
    def inputs(dtype):
        return (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),)

    return inputs


EXAMPLES = [
    mask((8, 8), 4, 1),
    mask((8, 12), 4, 3),
    mask((10, 5), 5, 2),
    mask((8, 12), 4, 2, stride=2),
    mask((6, 9), 3, 1, padded=True),
    mask((4, 8), 4, 0),
    ModuleExample(
        lambda: HaloAttention(6, 8, heads=2, block=4, halo=1, qkv_bias=True),
        image(1, 6, 8, 4),
        bad=(
            (lambda: HaloAttention(8, heads=3), "3 heads do not divide dim_out 8"),
            (lambda: HaloAttention(8, stride=3), "stride must be 1 or 2, got 3"),
            (lambda: HaloAttention(8, block=4)(torch.zeros(1, 8, 6, 8)), "block 4 does not divide"),
            (
                lambda: HaloAttention(8)(torch.zeros(1, 4, 8, 8)),
                "expected .batch, 8, rows, columns",
            ),
            (lambda: HaloAttention(8, halo=-1), "halo >= 0, got 8 and -1"),
        ),
    ),
    ModuleExample(
        lambda: HaloAttention(
            4, heads=1, block=4, halo=2, stride=2, mask_padding=False, scale_pos=True
        ),
        image(2, 4, 4, 8),
        bad=((lambda: Halo((8, 8), 4, 1, 3), "stride must be 1, or 2"),),
    ),
    ModuleExample(
        lambda: HaloBlock(6, 8, HaloAttention(4, heads=1, block=2, halo=1, stride=2), stride=2),
        image(2, 6, 4, 4),
        bad=(
            (
                lambda: HaloBlock(6, 8, HaloAttention(4, heads=1), stride=2),
                "stride is 2, but attention has stride 1",
            ),
        ),
    ),
]
