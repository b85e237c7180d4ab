"""Tiles of windows on a grid: a few queries against the box of keys that they see.

A box is many short stretches of the keys. So the keys of a strip, which is a box on every axis but the
last and goes along all of that, are copied together once, the last axis first: the box of each tile in
the strip is then one slice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..balance import balanced
from ..windows import Stretch, Windows
from .hidden import Hidden, remembered
from .tiles import Scratch

# Scores of one tile: 4 MB in float32, as in slices.
_PAIRS = 1 << 20
# Numbers of one strip of keys: 16 MB in float32. Larger ones leave the caches.
_STRIP = 1 << 22


class StripTiles:
    """Iterates over (key heads, strip, tile); grouped queries become more rows."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, windows: Windows, keep_lse: bool = True
    ) -> None:
        b, h, n, _ = q.shape
        self.hkv, self.windows, self.scratch = k.shape[1], windows, Scratch()
        self.shape, self.group, self.lines = (b, h, n), h // self.hkv, b * self.hkv
        self.q, self.k, self.v = (self._on_grid(x) for x in (q, k, v))
        self.out = v.new_empty(*self.q.shape[:-1], v.shape[3])
        self.lse = q.new_empty(*self.q.shape[:-1], 1 if keep_lse else 0)
        self.learns = False

    def _on_grid(self, x: Tensor) -> Tensor:
        """(B, heads, N, D) as (lines, heads a line, *grid, D)."""
        return x.reshape(self.lines, x.shape[1] // self.hkv, *self.windows.grid, x.shape[3])

    def __iter__(self) -> Iterator[StripTile]:
        *lead, last = self.windows.axes
        rows = math.prod(max(s.last - s.first for s in axis) for axis in self.windows.axes)
        across = math.prod(max(s.hi - s.lo for s in axis) for axis in lead)
        pairs = self.group * rows * across * max(s.hi - s.lo for s in last)
        numbers = across * self.windows.grid[-1] * self.k.shape[-1]
        room = min(_PAIRS // pairs, _STRIP // numbers)
        step = balanced(min(self.lines, room))
        for line in range(0, self.lines, step):
            lines = slice(line, min(line + step, self.lines))
            for box in itertools.product(*lead):
                strip = Strip(self, lines, box)
                for stretch in last:
                    yield StripTile(strip, stretch)
                strip.close()

    def hide(self, scores: Tensor, box: tuple[Stretch, ...]) -> None:
        """Set the pairs of a tile ``(..., queries, keys)`` that are not allowed to -inf, in place."""
        if not all(stretch.full for stretch in box):
            self._hidden(box).apply(scores)

    def _hidden(self, box: tuple[Stretch, ...]) -> Hidden:
        """What hides pairs in a tile; tiles whose windows lie alike share it."""

        def make() -> Hidden:
            allowed = torch.ones(1, 1, dtype=torch.bool)
            for stretch in box:
                own = stretch.allowed()
                allowed = (allowed[:, None, :, None] & own[None, :, None, :]).flatten(2)
                allowed = allowed.flatten(0, 1)
            return Hidden.of(allowed.to(self.q.device), self.q.dtype)

        kinds = (stretch.kind for stretch in box)
        return remembered(self.windows.memo, (self.q.dtype, *kinds), make)

    def result(self) -> tuple[Tensor, Tensor]:
        b, h, n = self.shape
        out = self.out.view(b, h, n, self.out.shape[-1])
        return out, self.lse.view(b, h, n if self.lse.shape[-1] else 0)

    def open_gradients(self, grad_out: Tensor, delta: Tensor, lse: Tensor) -> None:
        self.grad_out = self._on_grid(grad_out)
        self.delta, self.lse = (self._on_grid(x.unsqueeze(-1)) for x in (delta, lse))
        self.dq = torch.empty_like(self.q)
        self.dk, self.dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        self.learns = True

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        b, h, n = self.shape
        dk, dv = (x.view(b, self.hkv, n, x.shape[-1]) for x in (self.dk, self.dv))
        return self.dq.view(b, h, n, self.dq.shape[-1]), dk, dv


class Strip:
    """Keys and values of some heads: a box on every axis but the last, and the whole of that.

    Args:
        tiles: the call.
        lines: key heads, counted over the batch.
        box: a stretch of every axis but the last.
    """

    def __init__(self, tiles: StripTiles, lines: slice, box: tuple[Stretch, ...]) -> None:
        self.tiles, self.lines, self.box = tiles, lines, box
        self.across = math.prod(stretch.hi - stretch.lo for stretch in box)
        self.step = tiles.windows.axes[-1][0].step
        self.k, self.v = self._copy("k", tiles.k), self._copy("v", tiles.v)
        if tiles.learns:
            self.dk, self.dv = (
                tiles.scratch.take(name, x.shape, x).zero_()
                for name, x in (("strip dk", self.k), ("strip dv", self.v))
            )

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        """This strip of ``x`` (lines, 1, *grid, D), a residue class of the last axis at a time: views
        (lines, places, *box, D)."""
        keys = tuple(stretch.keys for stretch in self.box)
        at: tuple[slice | int, ...] = (self.lines, 0, *keys)
        part = x[at].movedim(-2, 1)
        for residue in range(min(self.step, part.shape[1])):
            yield part[:, residue :: self.step]

    def _copy(self, name: str, x: Tensor) -> Tensor:
        """This strip of ``x`` as (lines, last axis * box, D), residue classes one after the other."""
        shape = (self.lines.stop - self.lines.start, x.shape[-2] * self.across, x.shape[-1])
        out = self.tiles.scratch.take(name, shape, x)
        for own, part in self._pieces(out, x):
            own.copy_(part)
        return out

    def _pieces(self, strip: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of a strip beside what they hold of ``x``."""
        at = 0
        for part in self._parts(x):
            end = at + part.shape[1] * self.across
            yield strip[:, at:end].view(part.shape), part
            at = end

    def close(self) -> None:
        """Add the strip's gradients to those of all keys."""
        if not self.tiles.learns:
            return
        for strip, total in ((self.dk, self.tiles.dk), (self.dv, self.tiles.dv)):
            for own, part in self._pieces(strip, total):
                part.add_(own)


class StripTile:
    """Queries of a box of the grid, of some heads, against their box of keys in a strip."""

    def __init__(self, strip: Strip, last: Stretch) -> None:
        self.strip, self.tiles = strip, strip.tiles
        # The last axis first, as in strips.
        self.box = (last, *strip.box)
        self.scratch = strip.tiles.scratch
        start = last.before + last.lo
        self.cut = slice(start * strip.across, (start + last.hi - last.lo) * strip.across)
        self.q = self._rows(self.tiles.q)
        self.k, self.v = strip.k[:, self.cut], strip.v[:, self.cut]

    def _view(self, x: Tensor) -> Tensor:
        """This tile's rows of ``x`` (lines, group, *grid, D) as (lines, group, last, *box, D)."""
        last, *box = self.box
        queries = tuple(stretch.queries for stretch in (*box, last))
        at = (self.strip.lines, slice(None), *queries)
        return x[at].movedim(-2, 2)

    def _rows(self, x: Tensor) -> Tensor:
        part = self._view(x)
        return part.reshape(part.shape[0], -1, part.shape[-1])

    def _put(self, x: Tensor, rows: Tensor) -> None:
        part = self._view(x)
        part.copy_(rows.view(part.shape))

    @property
    def may_be_empty(self) -> bool:
        return False

    def block(self, scores: Tensor) -> None:
        self.tiles.hide(self.by_head(scores), self.box)

    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles, lines = self.tiles, self.strip.lines
        i, j = (self._positions(keys) for keys in (False, True))
        line = torch.arange(lines.start, lines.stop, device=tiles.q.device)[:, None]
        head = line % tiles.hkv * tiles.group + torch.arange(tiles.group, device=line.device)
        return i[:, None], j[None], head[:, :, None, None], (line // tiles.hkv)[:, :, None, None]

    def _positions(self, keys: bool) -> Tensor:
        """Positions in the sequence of the tile's queries or keys, in their order here."""
        grid = self.tiles.windows.grid
        apart = [1, *(math.prod(grid[axis:]) for axis in range(1, len(grid)))]
        found = torch.zeros(1, dtype=torch.int64, device=self.tiles.q.device)
        for stretch, stride in zip(self.box, apart, strict=True):
            at = stretch.keys if keys else stretch.queries
            place = torch.arange(at.start, at.stop, at.step, device=found.device) * stride
            found = (found[:, None] + place).flatten()
        return found

    def by_head(self, scores: Tensor) -> Tensor:
        return scores.view(scores.shape[0], self.tiles.group, -1, scores.shape[-1])

    def write(self, out: Tensor, lse: Tensor | None) -> None:
        self._put(self.tiles.out, out)
        if lse is not None:
            self._put(self.tiles.lse, lse)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        tiles = self.tiles
        return self._rows(tiles.grad_out), self._rows(tiles.delta), self._rows(tiles.lse)

    def add(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        self._put(self.tiles.dq, dq)
        self.strip.dk[:, self.cut].add_(dk)
        self.strip.dv[:, self.cut].add_(dv)
