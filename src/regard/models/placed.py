"""A mask written for a sequence, placed where the sequence lies inside a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.masks import Index, Mask, Shifted


@dataclass(frozen=True, eq=False)
class Placed(Mask):
    """``mask`` on positions counted from the start of each sequence.

    Position ``i`` of batch entry ``b`` becomes ``i - start[b]`` (left padding), or
    ``i - start[b, i]`` (packed sequences, each counted from its own start). What lies before the
    start counts as position 0: such positions are padding, and the model's own mask removes them.

    Args:
        mask: a mask in sequence positions.
        start: int64 ``(B,)``, or ``(B, M)`` with one start a position. May be negative, for caches
            that dropped their first keys.
    """

    mask: Mask
    start: Tensor

    @property
    def heads(self) -> int | None:
        return self.mask.heads

    @property
    def batch(self) -> int | None:
        return self.start.shape[0]

    @property
    def closed(self) -> bool:
        # a mask of distances alone does not care where the start is; the others need one start
        return self.mask.closed and (self.start.dim() == 1 or self.mask.relative)

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        self.mask.check(n, m - int(self.start.min()), heads, batch)

    def _moved(self, at: Tensor, start: Tensor) -> Tensor:
        return (at - start).clamp(min=0)

    def _start(self, i: Tensor, b: Index) -> Tensor:
        start = self.start.to(i.device)
        if start.dim() == 1:
            return start[b]
        return start[b, i.clamp(0, start.shape[1] - 1)]

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        start = self._start(i, b)
        return self.mask.allows(self._moved(i, start), self._moved(j, start), h, b)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        if not self.closed:
            return super().tile(i0, i1, j0, j1, h, b)
        if self.start.dim() == 2:
            return self.mask.tile(i0, i1, j0, j1, h, b)
        start = self._start(i0, b)
        i0, i1, j0, j1 = (self._moved(at, start) for at in (i0, i1, j0, j1))
        return self.mask.tile(i0, i1, j0, j1, h, b)


def place(mask: Mask, start: Tensor | None, offset: int) -> Mask:
    """``mask`` (sequence positions) as a mask of one call's positions.

    Args:
        mask: what the user wrote.
        start: where each sequence starts among the model's columns, ``(B,)`` or ``(B, M)``; ``None``
            when all start at column 0.
        offset: column of the call's first key (caches of sliding layers drop old keys).
    """
    if start is None:
        return mask if offset == 0 or mask.relative else Shifted(mask, offset)
    if mask.relative and start.dim() == 1:
        return mask
    first = start - offset
    if first.dim() == 1 and bool(torch.all(first == first[0])) and int(first[0]) <= 0:
        return mask if int(first[0]) == 0 else Shifted(mask, -int(first[0]))
    return Placed(mask, first)
