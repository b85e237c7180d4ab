"""Layouts of HaloNet's mask: see :class:`regard.patterns.halonet.Halo`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from regard.core.layout import BlockLayout, build_layout

from .halonet_mask import Halo


@lru_cache(maxsize=64)
def _layout(mask: Halo, block: tuple[int, int], device: torch.device) -> BlockLayout:
    bq, bk = block
    if bq < 1 or bk < 1:
        raise ValueError(f"Halo: block sides must be >= 1, got {block}")
    tile = _tile_shape(mask.key_grid, bk)
    if tile is None:
        return build_layout(mask, mask.queries, mask.keys, block, device)
    index, partial = _rectangles(mask, bq, tile, device)
    side = mask.block // mask.stride
    rows, columns = (x // mask.stride for x in mask.grid)
    return BlockLayout(
        mask.queries,
        mask.keys,
        bq,
        bk,
        index[None, None],
        partial[None, None],
        mask,
        _tiled(rows, columns, side, side, device),
        _tiled(*mask.key_grid, *tile, device),
    )


# The compiler would trace through the cache, and make the layout anew in every call.
halo_layout: Callable[[Halo, tuple[int, int], torch.device], BlockLayout] = torch.compiler.disable(
    _layout
)


def _rectangles(
    mask: Halo, bq: int, tile: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Key tiles of every query block, ascending, and which of them are partial: `(nq, K)`."""
    area, across = (mask.block // mask.stride) ** 2, mask.grid[1] // mask.block
    start = torch.arange(0, mask.queries, bq, device=device)
    first = start.div(area, rounding_mode="floor")
    last = ((start + bq).clamp(max=mask.queries) - 1).div(area, rounding_mode="floor")
    top, bottom = first // across, last // across
    one = top == bottom
    left = torch.where(one, first % across, 0)
    right = torch.where(one, last % across, across - 1)
    listed, whole, ids = [], [], []
    for low, high, side, extent in (
        (top, bottom, tile[0], mask.key_grid[0]),
        (left, right, tile[1], mask.key_grid[1]),
    ):
        a, z = low * mask.block - mask.reach, high * mask.block - mask.reach
        t0 = a.clamp(min=0).div(side, rounding_mode="floor")
        t1 = ((z + mask.window).clamp(max=extent) - 1).div(side, rounding_mode="floor")
        at = t0[:, None] + torch.arange(int((t1 - t0).max()) + 1, device=device)
        listed.append(at <= t1[:, None])
        # Seen by all its queries: inside the windows of the first and of the last block.
        begins, ends = at * side >= z[:, None], at * side + side <= (a + mask.window)[:, None]
        whole.append(begins & ends)
        ids.append(at)
    tiles = ids[0][:, :, None] * (mask.key_grid[1] // tile[1]) + ids[1][:, None, :]
    real = (listed[0][:, :, None] & listed[1][:, None, :]).flatten(1)
    full = (whole[0][:, :, None] & whole[1][:, None, :]).flatten(1)
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    width = int(real.sum(1).max())
    index = tiles.flatten(1).masked_fill(~real, -1).gather(1, order)[:, :width]
    return index.contiguous(), (real & ~full).gather(1, order)[:, :width].contiguous()


def _tile_shape(grid: tuple[int, int], area: int) -> tuple[int, int] | None:
    """Rows and columns, most square, of a tile of `area` tokens that divides the grid."""
    fits = [
        (rows, area // rows)
        for rows in range(1, area + 1)
        if area % rows == 0 and grid[0] % rows == 0 and grid[1] % (area // rows) == 0
    ]
    return min(fits, key=lambda s: abs(s[0] - s[1])) if fits else None


def _tiled(rows: int, columns: int, height: int, width: int, device: torch.device) -> Tensor | None:
    """Row-major token of every slot, tile by tile, `(1, 1, tokens)`; None where nothing moves."""
    if height == 1 or columns == width:
        return None
    at = torch.arange(rows * columns, device=device)
    cut = at.view(rows // height, height, columns // width, width).transpose(1, 2)
    return cut.reshape(1, 1, -1)
