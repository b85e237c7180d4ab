"""What the triton kernels need to know about a layout, made once and kept as long as it lives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import BlockLayout

# Pairs of a mask evaluated at once: their int64 positions take 8 MB.
_CHUNK = 1 << 20


def kernel_block(layout: BlockLayout) -> tuple[int, int]:
    """Block sides for the kernels: one block that holds a whole axis may be made wider than it."""
    sides = ((layout.block_q, layout.query_blocks), (layout.block_k, layout.key_blocks))
    bq, bk = (max(16, 1 << (side - 1).bit_length()) if n <= 1 else side for side, n in sides)
    return bq, bk


@dataclass(frozen=True)
class Lists:
    """Entries of a layout by line, a line being one (batch, head, block): int32 tensors.

    Attributes:
        start, middle, stop: where a line's entries begin, where its masked ones end, and where all
            do, ``(lines,)``.
        block: the block of the other axis that an entry names, ``(entries,)``.
        tile: the mask tile of an entry, meaningful for masked ones, ``(entries,)``.
    """

    start: Tensor
    middle: Tensor
    stop: Tensor
    block: Tensor
    tile: Tensor

    @classmethod
    def of(cls, line: Tensor, block: Tensor, tile: Tensor, lines: int) -> Lists:
        """Sort entries by line, masked ones (``tile >= 0``) first, otherwise in the order given."""
        masked = tile >= 0
        order = torch.argsort(2 * line + (~masked).long(), stable=True)
        counts = torch.bincount(line, minlength=lines)
        stop = counts.cumsum(0)
        start = stop - counts
        middle = start + torch.bincount(line[masked], minlength=lines)
        return cls(*(x.to(torch.int32) for x in (start, middle, stop, block[order], tile[order])))


class Tables:
    """What the kernels read of a layout: its lists, by query and by key block, and mask tiles."""

    def __init__(self, layout: BlockLayout) -> None:
        self.bl, self.hl = layout.index.shape[:2]
        self.block_q, self.block_k = kernel_block(layout)
        self.nq, self.nk = layout.query_blocks, layout.key_blocks
        b, h, row, slot = (layout.index >= 0).nonzero().unbind(-1)
        self._head, self._row = b * self.hl + h, row
        self._key = layout.index[b, h, row, slot]
        self._tile, self.bits = _mask_tiles(layout, b, h, row, slot, self._key)

    @cached_property
    def by_query(self) -> Lists:
        line = self._head * self.nq + self._row
        return Lists.of(line, self._key, self._tile, self.bl * self.hl * self.nq)

    @cached_property
    def by_key(self) -> Lists:
        line = self._head * self.nk + self._key
        return Lists.of(line, self._row, self._tile, self.bl * self.hl * self.nk)


_TABLES: WeakKeyDictionary[BlockLayout, Tables] = WeakKeyDictionary()


def tables(layout: BlockLayout) -> Tables:
    """The tables of a layout, made on first use and dropped with it."""
    found = _TABLES.get(layout)
    if found is None:
        found = _TABLES[layout] = Tables(layout)
    return found


def _mask_tiles(
    layout: BlockLayout, b: Tensor, h: Tensor, row: Tensor, slot: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Tile number of every entry (-1: needs none) and the distinct tiles, a bit for each pair.

    Entries share a tile where the mask cannot tell them apart: the same blocks of several heads or
    batch entries, or, for a mask of ``i - j`` alone, blocks at the same distance.

    Returns:
        ``(tile, bits)``: int64 ``(entries,)`` and uint8 ``(tiles, block_q, block_k // 8)``.
    """
    (bq, bk), nq, nk = kernel_block(layout), layout.query_blocks, layout.key_blocks
    mask, perms = layout.mask, [p for p in (layout.perm_q, layout.perm_k) if p is not None]
    partial = layout.partial[b, h, row, slot]
    ends = (key == nk - 1) & (layout.m % bk != 0)
    place = row * nk + key
    if mask is not None and mask.relative and not perms:
        # A short last key block keeps its own tile. A short last query block may share one: a tile
        # is made from the first of its entries, which has all rows, and surplus rows do no harm.
        place = torch.where(ends, place, row * bq - key * bk + nq * nk + layout.m)
    span = nq * nk + layout.m + nq * bq
    if (mask is not None and mask.heads is not None) or any(p.shape[1] > 1 for p in perms):
        place = place + h * span
    if (mask is not None and mask.batch is not None) or any(p.shape[0] > 1 for p in perms):
        place = place + b * span * layout.index.shape[1]
    # -2: no tile; -1: only the end of the keys, which is one tile for all.
    place = torch.where(partial, place, torch.where(ends, -1, -2))
    found, tile, counts = torch.unique(place, return_inverse=True, return_counts=True)
    first = torch.argsort(place, stable=True)[counts.cumsum(0) - counts]
    # One tile at least: a kernel's pointer should point somewhere.
    bits = torch.zeros((max(1, len(found)), bq, bk // 8), dtype=torch.uint8, device=key.device)
    for at in (found >= 0).nonzero()[:, 0].split(max(1, _CHUNK // (bq * bk))):
        pick = first[at]
        seen = layout.tile_mask(b[pick], h[pick], row[pick], slot[pick])
        seen = seen.expand(-1, layout.block_q, layout.block_k)
        bits[at] = _pack(pad(seen, (0, bk - layout.block_k, 0, bq - layout.block_q)))
    for at in (found == -1).nonzero()[:, 0]:
        end = torch.arange(bk, device=key.device) < layout.m - (nk - 1) * bk
        bits[at] = _pack(end.expand(bq, bk))
    return torch.where(place == -2, -1, tile), bits


def _pack(seen: Tensor) -> Tensor:
    """Booleans ``(..., 8 n)`` as bytes ``(..., n)``, the first one in the lowest bit."""
    weights = 2 ** torch.arange(8, device=seen.device, dtype=torch.uint8)
    octets = seen.reshape(*seen.shape[:-1], seen.shape[-1] // 8, 8).to(torch.uint8)
    return (octets * weights).sum(-1, dtype=torch.uint8)
