"""What each query block of a shared layout reads: stretches of keys, and which of them are masked."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import BlockLayout


@dataclass(frozen=True)
class Row:
    """One query block: rows ``start:stop`` against the key stretches ``runs``."""

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]
    # Columns of the tile that need the mask, with the positions of their keys.
    masked: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
    may_be_empty: bool

    @property
    def length(self) -> int:
        return sum(z - a for a, z in self.runs)


def rows_of(layout: BlockLayout) -> list[Row]:
    """The query blocks of a shared layout, made once and kept with it."""
    if "rows" in layout.memo:
        kept: list[Row] = layout.memo["rows"]
        return kept
    rows = []
    index, partial = layout.index[0, 0].tolist(), layout.partial[0, 0].tolist()
    for r, (blocks, flags) in enumerate(zip(index, partial, strict=True)):
        runs: list[list[int]] = []
        masked: list[tuple[int, int, list[list[int]]]] = []
        column, whole = 0, False
        for block, flag in zip(blocks, flags, strict=True):
            if block < 0:
                break
            a, z = block * layout.block_k, min((block + 1) * layout.block_k, layout.m)
            _extend(runs, a, z)
            if flag:
                if masked and masked[-1][1] == column:
                    _extend(masked[-1][2], a, z)
                    masked[-1] = (masked[-1][0], column + z - a, masked[-1][2])
                else:
                    masked.append((column, column + z - a, [[a, z]]))
            whole = whole or not flag
            column += z - a
        rows.append(
            Row(
                r * layout.block_q,
                min((r + 1) * layout.block_q, layout.n),
                _pairs(runs),
                tuple((a, z, _pairs(keys)) for a, z, keys in masked),
                layout.mask is not None and not whole,
            )
        )
    layout.memo["rows"] = rows
    return rows


def _extend(runs: list[list[int]], a: int, z: int) -> None:
    if runs and runs[-1][1] == a:
        runs[-1][1] = z
    else:
        runs.append([a, z])


def _pairs(runs: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((a, z) for a, z in runs)


@dataclass(frozen=True)
class Band:
    """``count`` consecutive rows that are the same but for their place along the diagonal."""

    row: Row
    count: int


def bands_of(layout: BlockLayout) -> list[Band]:
    """The rows of a layout, those that repeat along the diagonal taken together; made once."""
    if "bands" in layout.memo:
        kept: list[Band] = layout.memo["bands"]
        return kept
    bands: list[Band] = []
    repeats = not layout.permuted and (layout.mask is None or layout.mask.relative)
    for row in rows_of(layout):
        last = bands[-1] if bands else None
        if last is not None and repeats and _continues(last, row, layout.block_q):
            bands[-1] = Band(last.row, last.count + 1)
        else:
            bands.append(Band(row, 1))
    layout.memo["bands"] = bands
    return bands


def _continues(band: Band, row: Row, side: int) -> bool:
    """Whether ``row`` is the band's first row, moved on along the diagonal."""
    first, step = band.row, band.count * side
    if len(first.runs) != 1 or len(row.runs) != 1 or len(first.masked) != len(row.masked):
        return False
    (a, z), (c, d) = first.runs[0], row.runs[0]
    same = (c - a, d - z, row.stop - row.start) == (step, step, first.stop - first.start)
    columns = zip(first.masked, row.masked, strict=True)
    return same and all(one[:2] == other[:2] for one, other in columns)
