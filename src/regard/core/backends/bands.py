"""Tiles of rows that repeat along the diagonal: one head, many query blocks at a time.

The stretches of keys that successive rows read overlap. They are read where they stand, through a
view whose rows overlap, so that one batched product serves them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rows import Row

if TYPE_CHECKING:
    from .slices import SliceTiles


class BandTile:
    """``count`` query blocks of one key head, from the ``at``-th row of a band on.

    Args:
        tiles: the call.
        row: first row of the band.
        line: key head, counted over the batch.
    """

    def __init__(self, tiles: SliceTiles, row: Row, line: int, at: int, count: int) -> None:
        self.tiles, self.row, self.line, self.count = tiles, row, line, count
        self.scratch = tiles.scratch
        self.side = row.stop - row.start
        self.start = row.start + at * self.side
        self.key = row.runs[0][0] + at * self.side
        self.q = self._rows(tiles.q).flatten(1, 2)
        self.k, self.v = self._keys(tiles.k), self._keys(tiles.v)

    def _rows(self, x: Tensor) -> Tensor:
        """Rows of ``x`` (lines, group, N, ...) as (count, group, side, ...)."""
        part = x[self.line, :, self.start : self.start + self.count * self.side]
        return part.view(part.shape[0], self.count, self.side, *part.shape[2:]).transpose(0, 1)

    def _keys(self, x: Tensor) -> Tensor:
        """Overlapping stretches of ``x`` (lines, M, D) as (count, length, D), without a copy."""
        return self._stretch(x, 0, self.row.length).transpose(1, 2)

    def _stretch(self, x: Tensor, first: int, width: int) -> Tensor:
        start = self.key + first
        part = x[self.line, start : start + (self.count - 1) * self.side + width]
        stretches: Tensor = part.unfold(0, width, self.side)
        return stretches

    @property
    def may_be_empty(self) -> bool:
        return self.row.may_be_empty

    def block(self, scores: Tensor) -> None:
        self.tiles.hide(self.by_head(scores), self.row)

    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles, device = self.tiles, self.tiles.q.device
        move = torch.arange(self.count, device=device)[:, None, None, None] * self.side
        i = torch.arange(self.start, self.start + self.side, device=device)[:, None] + move
        j = torch.arange(self.key, self.key + self.row.length, device=device) + move
        head = self.line % tiles.hkv * tiles.group
        h = torch.arange(head, head + tiles.group, device=device)[:, None, None]
        b = torch.full((), self.line // tiles.hkv, device=device)
        return i + tiles.layout.m - tiles.layout.n, j, h, b

    def by_head(self, scores: Tensor) -> Tensor:
        return scores.view(self.count, self.tiles.group, self.side, scores.shape[-1])

    def write(self, out: Tensor, lse: Tensor | None) -> None:
        self._rows(self.tiles.out).copy_(self.by_head(out))
        if lse is not None:
            self._rows(self.tiles.lse).copy_(lse.view(self.count, self.tiles.group, self.side))

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        tiles = self.tiles
        delta, lse = (self._rows(x).flatten(1, 2).unsqueeze(-1) for x in (tiles.delta, tiles.lse))
        return self._rows(tiles.grad_out).flatten(1, 2), delta, lse

    def add(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        self._rows(self.tiles.dq).copy_(self.by_head(dq))
        # Pieces as wide as the step do not overlap, so that each is added in one go.
        for first in range(0, self.row.length, self.side):
            last = min(first + self.side, self.row.length)
            for total, part in ((self.tiles.dk, dk), (self.tiles.dv, dv)):
                self._stretch(total, first, last - first).add_(part[:, first:last].transpose(1, 2))
