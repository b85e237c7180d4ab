"""Tiles of masks that are a window on every axis of a grid: neighbourhoods in any dimension.

A tile of queries reads one box of keys, the span of its windows on every axis, and no key outside of it.
Blocks of a layout of the same size list whole blocks wherever a window reaches into one, which is a
fifth to a half more pairs. The sides of the tiles are those that cost least for a grid and its windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .grid import GridMask
from .mask import Mask

# Query rows and scores of a tile of one head, at most.
_ROWS, _PAIRS = 256, 1 << 20
# What is not arithmetic, in pairs of a query and a key that take as long (measured at D = 64): reading a
# key of a box, copying one into a strip, and starting the operations of a tile, which one thread does.
_KEY, _COPY, _START = 4, 9, 12_000


@dataclass(frozen=True)
class Stretch:
    """Neighbouring queries of an axis and the keys that they see. Places count steps of a residue class.

    Attributes:
        residue, step: position ``residue + step * t`` of the axis is place ``t``.
        before: positions of the axis in earlier residue classes.
        first, last: the queries are the places ``first <= t < last``.
        lo, hi: they see places ``lo <= t < hi`` among them.
        seen: first and past-the-last key of each query, counted from ``lo``.
        kind: a number of ``seen``: stretches of an axis whose windows lie alike have the same.
    """

    residue: int
    step: int
    before: int
    first: int
    last: int
    lo: int
    hi: int
    seen: tuple[tuple[int, int], ...]
    kind: int

    @cached_property
    def queries(self) -> slice:
        """The queries' positions on the axis."""
        return self._positions(self.first, self.last)

    @cached_property
    def keys(self) -> slice:
        """The keys' positions on the axis."""
        return self._positions(self.lo, self.hi)

    def _positions(self, first: int, last: int) -> slice:
        start, stop = (self.residue + self.step * t for t in (first, last - 1))
        return slice(start, stop + 1, self.step)

    @cached_property
    def full(self) -> bool:
        """Whether every query sees all of the keys."""
        return all(a == 0 and z == self.hi - self.lo for a, z in self.seen)

    def allowed(self) -> Tensor:
        """Which query sees which key, bool ``(queries, keys)``."""
        seen, key = torch.tensor(self.seen), torch.arange(self.hi - self.lo)
        return (key >= seen[:, :1]) & (key < seen[:, 1:])


@dataclass(frozen=True, eq=False)
class Windows:
    """A mask's windows, cut into tiles: every combination of a stretch of each axis is one.

    Attributes:
        grid: extents of the grid.
        axes: the stretches of every axis.
        density: pairs in the tiles over all pairs.
    """

    grid: tuple[int, ...]
    axes: tuple[tuple[Stretch, ...], ...]
    density: float
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)


def _windows(mask: Mask, n: int, m: int, heads: int, group: int) -> Windows | None:
    """The tiles of a call whose queries are the whole grid, made once for equal calls.

    Args:
        mask: any mask; only a :class:`GridMask` without text that defines ``windows`` has tiles.
        n, m: numbers of queries and keys.
        heads: key heads, over the batch.
        group: query heads a key head.

    Returns:
        None where the mask has no such windows, or on an axis alone, where blocks are as good.
    """
    if not isinstance(mask, GridMask) or n != m or len(mask.grid) < 2:
        return None
    if mask.tokens > mask.points or mask.windows(0, 0) is None:
        return None
    return _cut(mask, _sides(mask, max(1, heads), group, torch.get_num_threads()))


# Compiled code would trace the search and, as it skips Python's caches, repeat it in every call.
windows: Callable[..., Windows | None] = torch.compiler.disable(_windows)


def _classes(mask: GridMask, axis: int) -> list[tuple[Tensor, Tensor]]:
    """Both ends of the windows of every residue class of an axis that has positions."""
    found = [mask.windows(axis, g) for g in range(min(mask.steps[axis], mask.grid[axis]))]
    return [ends for ends in found if ends is not None]


@lru_cache(maxsize=256)
def _sides(mask: GridMask, heads: int, group: int, threads: int) -> tuple[int, ...]:
    """Sides of the tiles that cost least, for an axis each."""
    axes = len(mask.grid)
    every = [_sums(_classes(mask, axis)) for axis in range(axes)]

    def product(of: int, last: Tensor | None = None) -> Tensor:
        """The ``of``-th figure of every axis multiplied, for every combination of sides."""
        found = torch.ones(())
        for axis, figures in enumerate(every):
            own = figures[of] if last is None or axis < axes - 1 else last
            found = found[..., None] * own
        return found

    side, pairs, keys, count, box = range(5)
    # Strips hold the whole last axis, whatever its side.
    strips = product(keys, torch.full_like(every[-1][keys], mask.grid[-1]))
    cost = heads * (group * product(pairs) + _KEY * product(keys) + _COPY * strips)
    cost = cost + threads * _START * product(count)
    rows = group * product(side)
    cost = cost.masked_fill((rows > _ROWS) | (rows * product(box) > _PAIRS), math.inf)
    # Where even single queries read more keys than fit, they are the tiles.
    best = 0 if cost.isinf().all() else int(cost.argmin())
    return tuple(int(at) + 1 for at in torch.unravel_index(torch.tensor(best), cost.shape))


def _sums(classes: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For every side of the tiles from 1 on, on one axis: the side, pairs, keys and number of its
    stretches, and the most keys of one; float32 each."""
    rows = []
    for side in range(1, min(_ROWS, max(len(lo) for lo, _ in classes)) + 1):
        pairs = keys = count = most = 0
        for lo, hi in classes:
            first = torch.arange(0, len(lo), side)
            last = (first + side).clamp(max=len(lo))
            wide = hi[last - 1] - lo[first]
            pairs += int((wide * (last - first)).sum())
            keys += int(wide.sum())
            count += len(first)
            most = max(most, int(wide.max()))
        rows.append([side, pairs, keys, count, most])
    return list(torch.tensor(rows, dtype=torch.float32).unbind(1))


@lru_cache(maxsize=64)
def _cut(mask: GridMask, sides: tuple[int, ...]) -> Windows:
    axes = tuple(tuple(_stretches(mask, axis, side)) for axis, side in enumerate(sides))
    pairs = math.prod(sum((s.last - s.first) * (s.hi - s.lo) for s in axis) for axis in axes)
    return Windows(mask.grid, axes, pairs / mask.points**2)


def _stretches(mask: GridMask, axis: int, side: int) -> Iterator[Stretch]:
    """An axis cut into stretches of at most ``side`` queries, residue class after residue class."""
    kinds: dict[tuple[tuple[int, int], ...], int] = {}
    before = 0
    for residue, (lo, hi) in enumerate(_classes(mask, axis)):
        ends = list(zip(lo.tolist(), hi.tolist(), strict=True))
        for first in range(0, len(ends), side):
            part = ends[first : first + side]
            low, high = part[0][0], part[-1][1]
            seen = tuple((a - low, z - low) for a, z in part)
            kind = kinds.setdefault(seen, len(kinds))
            last = first + len(part)
            yield Stretch(residue, mask.steps[axis], before, first, last, low, high, seen, kind)
        before += len(ends)
