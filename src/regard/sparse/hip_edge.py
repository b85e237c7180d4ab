"""The key block that HiP's window cuts in two: read from the window's first key on, unless kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.layout import Index
from ..core.mask import Mask


@dataclass(frozen=True, eq=False, repr=False)
class WindowEdge(Mask):
    """Hides, for each query block, the keys ``low <= j < high``.

    A window of tokens need not begin where a key block does. Its first block is read in part, and a
    layout says such things by its mask.

    Args:
        n, m: numbers of queries and keys that it is made for.
        block_q: queries a block.
        low, high: int64 ``(B, H, nq)``, ``low == high`` where nothing is hidden.
    """

    n: int
    m: int
    block_q: int
    low: Tensor
    high: Tensor

    @property
    def heads(self) -> int | None:
        return self.low.shape[1] if self.low.shape[1] > 1 else None

    @property
    def batch(self) -> int | None:
        return self.low.shape[0] if self.low.shape[0] > 1 else None

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if (n, m) != (self.n, self.m):
            raise ValueError(
                f"WindowEdge: made for {self.n} queries and {self.m} keys, the call has {n} and {m}"
            )

    def _hidden(self, row: Tensor, h: Index, b: Index) -> tuple[Tensor, Tensor]:
        h = h if self.heads is not None else 0
        b = b if self.batch is not None else 0
        return self.low.to(row.device)[b, h, row], self.high.to(row.device)[b, h, row]

    def _row(self, i: Tensor) -> Tensor:
        return torch.div(i - self.m + self.n, self.block_q, rounding_mode="floor")

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        low, high = self._hidden(self._row(i), h, b)
        return (j < low) | (j >= high)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Exact for rectangles inside one query block."""
        row = self._row(i0)
        low, high = self._hidden(row, h, b)
        within = row == self._row(i1)
        inside = (j0 >= low) & (j1 < high)
        return ~(within & inside), within & ((j1 < low) | (j0 >= high))

    def __repr__(self) -> str:
        return f"<WindowEdge for {self.n} queries and {self.m} keys>"
