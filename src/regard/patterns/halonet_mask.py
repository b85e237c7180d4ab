"""The pattern of HaloNet as a mask: see :mod:`regard.patterns.halonet`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.layout import BlockLayout, Index
from regard.core.masks import Mask


@dataclass(frozen=True)
class Halo(Mask):
    """A query sees its block of the grid and `halo` pixels around it (arXiv 2103.12731, 2.2).

    Keys are the grid row by row, queries the grid divided by `stride` row by row.

    Attributes:
        grid: `(Y, X)`, rows and columns.
        block: `b`, side of a block; divides both.
        halo: `h`, pixels seen around it.
        stride: 1, or 2 for queries that stand for 2 x 2 pixels.
        padded: keys are the grid enlarged by `halo` on all sides, `(Y + 2 h)(X + 2 h)` of them.
    """

    grid: tuple[int, int]
    block: int
    halo: int
    stride: int = 1
    padded: bool = False

    def __post_init__(self) -> None:
        if self.block < 1 or self.halo < 0:
            raise ValueError(
                f"Halo: expected block >= 1 and halo >= 0, got {self.block} and {self.halo}"
            )
        if len(self.grid) != 2 or any(side < 1 or side % self.block for side in self.grid):
            raise ValueError(
                f"Halo: block {self.block} does not divide the grid {tuple(self.grid)}; pad it"
            )
        if self.stride not in (1, 2) or self.block % self.stride:
            raise ValueError(
                f"Halo: stride must be 1, or 2 with an even block, got {self.stride} with block "
                f"{self.block}"
            )
        object.__setattr__(self, "grid", tuple(self.grid))

    constant = True

    @property
    def window(self) -> int:
        """Side of a block's window, `b + 2 h`."""
        return self.block + 2 * self.halo

    @property
    def reach(self) -> int:
        """Keys before a block's first row that its window begins at, in coordinates of the keys."""
        return 0 if self.padded else self.halo

    @property
    def key_grid(self) -> tuple[int, int]:
        extra = 2 * self.halo if self.padded else 0
        return self.grid[0] + extra, self.grid[1] + extra

    @property
    def queries(self) -> int:
        return self.grid[0] * self.grid[1] // self.stride**2

    @property
    def keys(self) -> int:
        return self.key_grid[0] * self.key_grid[1]

    @property
    def exact_blocks(self) -> tuple[int, int]:
        """Sides for :meth:`layout` with which no listed block is partial: one block of the image
        against squares that its window is made of."""
        edge = math.gcd(self.block, self.window if self.padded else self.halo)
        return (self.block // self.stride) ** 2, edge**2

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        if (n, m) != (self.queries, self.keys):
            raise ValueError(
                f"Halo: made for {self.queries} queries and {self.keys} keys, "
                f"the call has {n} and {m}"
            )

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        y, x = _coordinates(i + self.queries - self.keys, self.grid[1] // self.stride)
        ky, kx = _coordinates(j, self.key_grid[1])
        return self._sees(y, ky) & self._sees(x, kx)

    def _sees(self, at: Tensor, key: Tensor) -> Tensor:
        start = at.div(self.block // self.stride, rounding_mode="floor") * self.block - self.reach
        return (key >= start) & (key < start + self.window)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        shift, columns = self.queries - self.keys, self.grid[1] // self.stride
        rows, cols = _boxes(i0 + shift, i1 + shift, columns)
        key_rows, key_cols = _boxes(j0, j1, self.key_grid[1])
        some = every = torch.ones_like(i0 + j0, dtype=torch.bool)
        for (first, last), (low, high) in ((rows, key_rows), (cols, key_cols)):
            side = self.block // self.stride
            a = first.div(side, rounding_mode="floor") * self.block - self.reach
            z = last.div(side, rounding_mode="floor") * self.block - self.reach
            some = some & (high >= a) & (low < z + self.window)
            every = every & (low >= z) & (high < a + self.window)
        return some, every

    def layout(
        self,
        n: int,
        m: int | None = None,
        block: int | tuple[int, int] = 128,
        *,
        device: Any = None,
    ) -> BlockLayout:
        """Queries block by block of the image, keys in tiles of the grid: a query block's keys are
        then a rectangle of tiles, listed without a look at the others. Where no tile of `block_k`
        keys divides the grid, tokens stay row by row."""
        # Not imported above: the layout needs this class, and is not to be traced by the compiler.
        from .halonet_layout import halo_layout

        m = n if m is None else m
        self.check(n, m)
        sides = (block, block) if isinstance(block, int) else block
        return halo_layout(self, sides, torch.device("cpu" if device is None else device))


def _coordinates(at: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return at.div(columns, rounding_mode="floor"), at % columns


def _boxes(
    first: Tensor, last: Tensor, columns: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Ranges of rows and columns, ends included, that a stretch of row-major tokens lies in."""
    (top, left), (bottom, right) = _coordinates(first, columns), _coordinates(last, columns)
    one = top == bottom
    return (top, bottom), (
        torch.where(one, left, 0),
        torch.where(one, right, columns - 1),
    )
