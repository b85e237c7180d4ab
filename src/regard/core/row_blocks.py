"""Attention in which every query row names the one key block that it reads.

Methods that let each token and head choose its own blocks make one row of each choice. Rows that name
the same block are brought together into tiles, so that a block is read once for all of them: the work
is that of the chosen blocks, and what moves in memory is queries, which are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import attend
from .layout import BlockLayout

__all__ = ["attend_row_blocks"]

_TILE = 64


def attend_row_blocks(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, block: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each row inside its block.

    Args:
        q: rows `(B, H, R, D)`; they have no positions of their own.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`; `Hkv` divides `H`.
        choice: int64 `(B, H, R)`, the key block of each row, -1 for none.
        block: keys a block; the last one may be short.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(out, lse)`, `(B, H, R, Dv)` and `(B, H, R)`, for :func:`regard.core.merge.merge`; rows without
        a block are 0 and `-inf`. What a row gives does not depend on later rows, to the bit.

    Raises:
        ValueError: `choice` does not fit the rows or names no block.
    """
    if choice.shape != q.shape[:3]:
        raise ValueError(
            f"attend_row_blocks: choice is {tuple(choice.shape)}, expected {tuple(q.shape[:3])}"
        )
    m, rows = k.shape[2], q.shape[2]
    blocks = -(-m // block)
    if choice.numel() and not -1 <= int(choice.min()) <= int(choice.max()) < blocks:
        raise ValueError(
            f"attend_row_blocks: choice must lie in [-1, {blocks}), got {int(choice.min())} to "
            f"{int(choice.max())}"
        )
    tile = _TILE
    while tile > 1 and tile * max(1, blocks) > rows:
        tile //= 2
    place, index = _tiles(choice, blocks, tile)
    slots = index.shape[2] * tile
    source = choice.new_zeros(*choice.shape[:2], slots + 1)
    source.scatter_(2, place, torch.arange(rows, device=q.device).expand(place.shape))
    gathered = q.gather(2, source[..., :slots, None].expand(-1, -1, -1, q.shape[-1]))
    layout = BlockLayout(slots, m, tile, block, index, torch.zeros_like(index, dtype=torch.bool))
    out, lse = attend(gathered, k, v, layout=layout, scale=scale, return_lse=True)
    # Rows without a block read the slot behind the last one.
    out = torch.nn.functional.pad(out, (0, 0, 0, 1))
    lse = torch.nn.functional.pad(lse, (0, 1), value=-torch.inf)
    return out.gather(2, place[..., None].expand(-1, -1, -1, out.shape[-1])), lse.gather(2, place)


def _tiles(choice: Tensor, blocks: int, tile: int) -> tuple[Tensor, Tensor]:
    """The slot of each row `(B, H, R)` and the block of each tile of slots `(B, H, T, 1)`.

    Blocks start at whole tiles and keep the order of the rows. Rows without a block get slot
    `T * tile`.
    """
    b, h, rows = choice.shape
    key = torch.where(choice < 0, blocks, choice)
    ordered, order = key.sort(dim=-1, stable=True)
    count = key.new_zeros(b, h, blocks + 1).scatter_add_(2, key, torch.ones_like(key))
    tiles = -(-count[..., :blocks] // tile)
    ends = tiles.cumsum(-1)
    width = int(ends[..., -1:].max()) if ends.numel() else 0
    first = torch.nn.functional.pad(count.cumsum(-1), (1, 0)).gather(2, ordered)
    start = torch.nn.functional.pad(ends, (1, 0)) * tile
    slot = start.gather(2, ordered) + torch.arange(rows, device=key.device) - first
    slot = torch.where(ordered == blocks, width * tile, slot)
    place = torch.empty_like(slot).scatter_(2, order, slot)
    at = torch.arange(width, device=key.device).expand(b, h, width).contiguous()
    index = torch.searchsorted(ends.contiguous(), at, right=True)
    return place, torch.where(index == blocks, -1, index)[..., None]
