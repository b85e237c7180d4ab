"""Tiles of a layout that all heads share: rows of queries against slices of the keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..balance import balanced
from ..layout import BlockLayout
from .bands import BandTile
from .hidden import Hidden, remembered
from .rows import Row, bands_of
from .tiles import Scratch

# Scores of one tile: 4 MB in float32. With fewer, the products of a few heads keep no two cores busy;
# with more, they leave the caches (measured).
_PAIRS = 1 << 20


class SliceTiles:
    """Iterates over (query block, group of key heads); grouped queries become more rows."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, keep_lse: bool = True
    ) -> None:
        b, h, n, d = q.shape
        hkv, m = k.shape[1], k.shape[2]
        self.shape, self.group, self.lines = (b, h, n), h // hkv, b * hkv
        self.layout, self.hkv, self.scratch = layout, hkv, Scratch()
        self.perm_q, self.perm_k = (None if p is None else p[0, 0] for p in layout.perms)
        q, k, v = _take(q, self.perm_q), _take(k, self.perm_k), _take(v, self.perm_k)
        # Original positions of the rows and columns, in the order in which they stand here.
        at_q = torch.arange(n, device=q.device) if self.perm_q is None else self.perm_q
        self.at_q = at_q + m - n
        self.at_k = torch.arange(m, device=q.device) if self.perm_k is None else self.perm_k
        self.q = q.reshape(self.lines, self.group, n, d)
        self.k = k.reshape(self.lines, m, d)
        self.v = v.reshape(self.lines, m, v.shape[3])
        self.out = v.new_empty(self.lines, self.group, n, v.shape[3])
        rows = n if keep_lse else 0
        self.lse = q.new_full((self.lines, self.group, rows), float("-inf"))

    def __iter__(self) -> Iterator[SliceTile | BandTile]:
        for band in bands_of(self.layout):
            row = band.row
            side = row.stop - row.start
            if not row.runs:
                self.out[:, :, row.start : row.start + band.count * side] = 0.0
                continue
            pairs = self.group * side * row.length
            if band.count > 1:
                step = balanced(min(band.count, _PAIRS // pairs))
                for line in range(self.lines):
                    for at in range(0, band.count, step):
                        yield BandTile(self, row, line, at, min(step, band.count - at))
            else:
                step = balanced(min(self.lines, _PAIRS // pairs))
                for line in range(0, self.lines, step):
                    yield SliceTile(self, row, slice(line, min(line + step, self.lines)))

    def hide(self, scores: Tensor, row: Row) -> None:
        """Set a row's pairs ``(..., R, L)`` that are not allowed to -inf, in place."""
        if self.layout.mask is None:
            return
        for at, (a, z, _) in enumerate(row.masked):
            self._hidden(row, at).apply(scores[..., a:z])

    def _hidden(self, row: Row, at: int) -> Hidden:
        """What hides pairs in the ``at``-th masked stretch of a row."""
        layout, (a, z, keys) = self.layout, row.masked[at]
        assert layout.mask is not None
        key: tuple[object, ...] = (row.start, at)
        if layout.mask.relative and len(keys) == 1 and not layout.permuted:
            key = (row.start - keys[0][0], row.stop - row.start, z - a, "relative")

        def make() -> Hidden:
            assert layout.mask is not None
            allowed = layout.mask.allows(*self.positions(row, keys))
            return Hidden.of(allowed.expand(row.stop - row.start, z - a), self.q.dtype)

        return remembered(layout.memo, (self.q.dtype, *key), make)

    def positions(self, row: Row, runs: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """Original positions of a row's queries ``(R, 1)`` and of stretches of keys ``(1, L)``."""
        j = torch.cat([self.at_k[a:z] for a, z in runs])
        return self.at_q[row.start : row.stop, None], j[None, :]

    def result(self) -> tuple[Tensor, Tensor]:
        b, h, n = self.shape
        out, lse = (
            self.out.view(b, h, n, self.out.shape[-1]),
            self.lse.view(b, h, self.lse.shape[-1]),
        )
        return _put(out, self.perm_q), _put(lse, self.perm_q) if lse.numel() else lse

    def open_gradients(self, grad_out: Tensor, delta: Tensor, lse: Tensor) -> None:
        lines, group, n = self.lines, self.group, self.shape[2]
        grad_out, delta, lse = (_take(x, self.perm_q) for x in (grad_out, delta, lse))
        self.grad_out = grad_out.reshape(lines, group, n, grad_out.shape[-1])
        self.delta = delta.reshape(lines, group, n)
        self.lse = lse.reshape(lines, group, n)
        self.dq, self.dk, self.dv = (torch.zeros_like(x) for x in (self.q, self.k, self.v))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        b, h, n = self.shape
        dk, dv = (x.view(b, self.hkv, *x.shape[1:]) for x in (self.dk, self.dv))
        dq = self.dq.view(b, h, n, self.dq.shape[-1])
        return _put(dq, self.perm_q), _put(dk, self.perm_k), _put(dv, self.perm_k)


def _take(x: Tensor, perm: Tensor | None) -> Tensor:
    """Rows of ``x`` (B, H, L, ...) in the order of ``perm`` (L,)."""
    return x if perm is None else x.index_select(2, perm)


def _put(x: Tensor, perm: Tensor | None) -> Tensor:
    """Undo :func:`_take`."""
    return x if perm is None else torch.empty_like(x).index_copy_(2, perm, x)


class SliceTile:
    """One query block of some heads against its stretches of keys."""

    def __init__(self, tiles: SliceTiles, row: Row, lines: slice) -> None:
        self.tiles, self.row, self.lines, self.scratch = tiles, row, lines, tiles.scratch
        self.q = self._rows(tiles.q)
        self.k, self.v = self._keys("k", tiles.k), self._keys("v", tiles.v)

    def _rows(self, x: Tensor) -> Tensor:
        return x[self.lines, :, self.row.start : self.row.stop].flatten(1, 2)

    def _keys(self, name: str, x: Tensor) -> Tensor:
        parts = [x[self.lines, a:z] for a, z in self.row.runs]
        if len(parts) == 1:
            return parts[0]
        shape = (parts[0].shape[0], self.row.length, x.shape[2])
        return torch.cat(parts, dim=1, out=self.scratch.take(name, shape, x))

    @property
    def may_be_empty(self) -> bool:
        return self.row.may_be_empty

    def block(self, scores: Tensor) -> None:
        rows = self.row.stop - self.row.start
        self.tiles.hide(scores.view(-1, self.tiles.group, rows, scores.shape[-1]), self.row)

    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles, device = self.tiles, self.tiles.q.device
        i, j = tiles.positions(self.row, self.row.runs)
        line = torch.arange(self.lines.start, self.lines.stop, device=device)[:, None]
        head = line % tiles.hkv * tiles.group + torch.arange(tiles.group, device=device)
        return i, j, head[:, :, None, None], (line // tiles.hkv)[:, :, None, None]

    def by_head(self, scores: Tensor) -> Tensor:
        return scores.view(scores.shape[0], self.tiles.group, -1, scores.shape[-1])

    def write(self, out: Tensor, lse: Tensor | None) -> None:
        at = (self.lines, slice(None), slice(self.row.start, self.row.stop))
        group = self.tiles.group
        self.tiles.out[at] = out.view(out.shape[0], group, -1, out.shape[-1])
        if lse is not None:
            self.tiles.lse[at] = lse.view(lse.shape[0], group, -1)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        tiles = self.tiles
        delta, lse = (self._rows(x).unsqueeze(-1) for x in (tiles.delta, tiles.lse))
        return self._rows(tiles.grad_out), delta, lse

    def add(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        tiles, start, stop = self.tiles, self.row.start, self.row.stop
        tiles.dq[self.lines, :, start:stop] = dq.view(dq.shape[0], tiles.group, stop - start, -1)
        column = 0
        for a, z in self.row.runs:
            tiles.dk[self.lines, a:z] += dk[:, column : column + z - a]
            tiles.dv[self.lines, a:z] += dv[:, column : column + z - a]
            column += z - a
