"""Masks on grids of tokens: images, videos, and text beside them.

A grid is flattened row by row; text tokens may stand before or after it. A mask on a grid says which
points see which (:meth:`GridMask.near`), and bounds that for boxes of points (:meth:`GridMask.box`).
From the two come everything that a mask needs, and layouts whose blocks are compact tiles of the grid
instead of pieces of rows (multi-dimensional tiling, arXiv 2403.04690, section 3): their permutation
is chosen here, by the number of pairs that it leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .layout import BlockLayout, Index
from .mask import Mask

# One tensor for each axis of the grid.
Point: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Box:
    """Bounds of sets of grid points, one tensor for each axis; both ends belong to the box.

    Attributes:
        lo, hi: smallest and largest coordinate. Where the mask has :attr:`GridMask.steps`, they count
            steps inside a residue class: coordinate ``x`` is step ``x // step`` of class ``x % step``.
        first, last: smallest and largest residue class; 0 without steps.
    """

    lo: Point
    hi: Point
    first: Point
    last: Point


@dataclass(frozen=True)
class Blocks:
    """What blocks of tokens hold: bounds of their grid points, and whether there are any.

    Attributes:
        box: bounds of the grid points alone; meaningless where ``grid`` is False.
        grid, text: whether a block holds grid points, and text tokens.
    """

    box: Box
    grid: Tensor
    text: Tensor

    def along(self, axis: int, rows: slice | Tensor = slice(None)) -> Blocks:
        """Some of the blocks, with a new axis of size 1 at ``axis``."""

        def cut(x: Tensor) -> Tensor:
            return x[rows].unsqueeze(axis)

        box = self.box
        parts = (tuple(map(cut, part)) for part in (box.lo, box.hi, box.first, box.last))
        return Blocks(Box(*parts), cut(self.grid), cut(self.text))


class GridMask(Mask):
    """A mask on a grid. Subclasses are frozen dataclasses that hold ``grid`` and define
    :meth:`near` and :meth:`box`; both hold no tensors.

    The sequence is ``text_before`` text tokens, the grid row by row, ``text_after`` text tokens; a
    pair with a text token on either side is allowed. The keys are the whole sequence, the queries
    its last ``n`` tokens (normally all).

    Attributes:
        grid: extents of the grid, slowest axis first.
    """

    grid: tuple[int, ...]

    @property
    def text_before(self) -> int:
        """Number of text tokens before the grid."""
        return 0

    @property
    def text_after(self) -> int:
        """Number of text tokens after the grid."""
        return 0

    @property
    def steps(self) -> tuple[int, ...]:
        """Dilation of each axis: points whose coordinates differ modulo it never see each other."""
        return (1,) * len(self.grid)

    def near(self, q: Point, k: Point) -> Tensor:
        """Whether grid point ``q`` may look at grid point ``k``.

        Args:
            q, k: int64 coordinates, a tensor for each axis, broadcastable against each other.

        Returns:
            A bool tensor of the joint shape.
        """
        raise NotImplementedError

    def box(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        """Bounds for all points of two boxes, which broadcast against each other.

        That points of different residue classes never see each other is taken care of elsewhere:
        assume here that the classes of the two boxes are the same.

        Returns:
            ``(some, every)``: ``some`` is False only where no point of ``q`` sees one of ``k``,
            ``every`` is True only where each sees all of them.
        """
        raise NotImplementedError

    def windows(self, axis: int, residue: int) -> tuple[Tensor, Tensor] | None:
        """The keys of each place on one axis, where the mask is a window on every axis by itself.

        Such a mask allows a pair of grid points if on every axis both belong to the same residue class
        and the key's place lies in the window of the query's place. Windows are never empty, and
        neither end moves back from one place to the next.

        Args:
            axis: an axis of the grid.
            residue: a residue class of its :attr:`steps`; its places count steps.

        Returns:
            ``(lo, hi)``, int64, one entry a place, keys ``lo <= t < hi``; None for other masks.
        """
        return None

    @property
    def points(self) -> int:
        """Number of grid points."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.text_before + self.points + self.text_after

    closed = True
    constant = True

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if m != self.tokens or n > m:
            text = self.text_before + self.text_after
            extra = f" and {text} text tokens" if text else ""
            raise ValueError(
                f"{type(self).__name__}: made for a grid of {' x '.join(map(str, self.grid))}"
                f"{extra}, {self.tokens} in all, but the call has {n} queries and {m} keys"
            )

    def at(self, position: Tensor) -> Point:
        """Coordinates of positions in the sequence; those off the grid get some point of it."""
        rest = (position - self.text_before).clamp(0, self.points - 1)
        found: list[Tensor] = []
        for extent in reversed(self.grid):
            found.insert(0, rest % extent)
            rest = torch.div(rest, extent, rounding_mode="floor")
        return tuple(found)

    def is_text(self, position: Tensor) -> Tensor:
        """Whether positions in the sequence are text tokens."""
        first = self.text_before
        return (position < first) | (position >= first + self.points)

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        out = self.near(self.at(i), self.at(j))
        if self.tokens > self.points:
            out = out | self.is_text(i) | self.is_text(j)
        return out

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        return self.related(self._stretch(i0, i1), self._stretch(j0, j1))

    def related(self, q: Blocks, k: Blocks) -> tuple[Tensor, Tensor]:
        """``(some, every)`` as in :meth:`box`, for blocks of any tokens."""
        some, every = self.box(q.box, k.box)
        for axis, step in enumerate(self.steps):
            if step > 1:
                first, last = q.box.first[axis], q.box.last[axis]
                other = k.box.first[axis]
                some = some & (first <= k.box.last[axis]) & (other <= last)
                every = every & (first == last) & (other == first) & (k.box.last[axis] == first)
        both = q.grid & k.grid
        return (some & both) | q.text | k.text, every | ~both

    def _stretch(self, first: Tensor, last: Tensor) -> Blocks:
        """The blocks of consecutive positions ``first..last``."""
        begin, end = self.text_before, self.text_before + self.points - 1
        low, high = self.at(first), self.at(last)
        lo, hi, one, other = [], [], [], []
        same = torch.ones_like(first, dtype=torch.bool)
        for a, z, extent, step in zip(low, high, self.grid, self.steps, strict=True):
            # Rows in between are whole: beyond the first axis that differs, all coordinates occur.
            a, z = torch.where(same, a, 0), torch.where(same, z, extent - 1)
            same = same & (a == z)
            lo.append(torch.div(a, step, rounding_mode="floor"))
            hi.append(torch.div(z, step, rounding_mode="floor"))
            wraps = (z - a >= step - 1) | (a % step > z % step)
            one.append(torch.where(wraps, 0, a % step))
            other.append(torch.where(wraps, step - 1, z % step))
        box = Box(tuple(lo), tuple(hi), tuple(one), tuple(other))
        grid = (first <= end) & (last >= begin)
        return Blocks(box, grid, (first < begin) | (last > end))

    def layout(
        self,
        n: int,
        m: int | None = None,
        block: int | tuple[int, int] = 128,
        *,
        device: Any = None,
    ) -> BlockLayout:
        """The key blocks that each query block reads, tokens permuted into tiles of the grid.

        Text tokens come last. The shapes of the tiles are those that list the fewest pairs; where no
        permutation lists fewer than the order of the sequence, there is none. See :meth:`Mask.layout`.
        """
        # Not imported above: the layout needs this class.
        from .grid_layout import grid_layout

        m = n if m is None else m
        self.check(n, m)
        return grid_layout(self, n, m, block, device)
