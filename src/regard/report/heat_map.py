"""A table of results as a heat map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..models.table import Table
from .pictures import ACCENT, PAPER, png

_BELOW = "#b3422f"
# Cells of more than so many rows or columns are not labelled one by one.
_TICKS = 40


def heat_map(
    table: Table,
    value: str,
    *,
    rows: str = "layer",
    columns: str = "head",
    path: str | Path | None = None,
    title: str | None = None,
) -> bytes:
    """Draw a value over two of a table's columns as a labelled PNG.

        heat_map(table, "entropy", path="entropy.png")

    Values of both signs are drawn around 0. Pairs that the table lacks, and values that are no
    number, stay white.

    Args:
        table: one row for every pair; choose with :meth:`Table.where` where it has more.
        value: the column that is drawn.
        rows, columns: the columns that say where, in the order in which their entries come.
        path: also write the PNG to this file.
        title: what stands above the picture, by default the value's name.

    Returns:
        The PNG's bytes.

    Raises:
        ValueError: a column that the table lacks, no rows, a pair that comes twice, or values that
            are no numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    downs, acrosses, grid = _grid(table, value, rows, columns)
    known = [x for line in grid for x in line if math.isfinite(x)]
    least, most = (min(known), max(known)) if known else (0.0, 0.0)
    colours, low, high = [PAPER, ACCENT], min(least, most), most
    if least < 0 < most:
        high = max(-least, most)
        colours, low = [_BELOW, PAPER, ACCENT], -high
    size = (min(14.0, 2.2 + 0.32 * len(acrosses)), min(14.0, 1.4 + 0.24 * len(downs)))
    figure = Figure(figsize=size, dpi=144)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = axes.imshow(
        grid,
        cmap=LinearSegmentedColormap.from_list("regard", colours),
        vmin=low,
        vmax=high if high > low else low + 1.0,
        aspect="auto",
        interpolation="nearest",
    )
    for axis, names, words in ((axes.yaxis, downs, rows), (axes.xaxis, acrosses, columns)):
        step = -(-len(names) // _TICKS)
        axis.set_ticks(range(0, len(names), step))
        axis.set_ticklabels([str(x) for x in names[::step]], fontsize=6, parse_math=False)
        axis.set_label_text(words, fontsize=8, parse_math=False)
    if any(not isinstance(x, int) for x in acrosses):
        axes.tick_params(axis="x", rotation=90)
    bar = figure.colorbar(shown, ax=axes)
    bar.ax.tick_params(labelsize=6)
    axes.set_title(value if title is None else title, fontsize=9, parse_math=False)
    return png(figure, path)


def _grid(
    table: Table, value: str, rows: str, columns: str
) -> tuple[list[Any], list[Any], list[list[float]]]:
    """Entries of both columns in their order, and the values between them, NaN where there is none."""
    given = list(zip(table.column(rows), table.column(columns), table.column(value), strict=True))
    if not given:
        raise ValueError("heat_map: the table has no rows")
    downs, acrosses = (list(dict.fromkeys(line[at] for line in given)) for at in (0, 1))
    found: dict[tuple[Any, Any], float] = {}
    for down, across, x in given:
        if isinstance(x, bool) or not isinstance(x, int | float):
            raise ValueError(f"heat_map: {value} holds {x!r}, expected numbers")
        if (down, across) in found:
            raise ValueError(
                f"heat_map: {rows} {down!r} and {columns} {across!r} come twice; choose rows of the "
                "table with where(...)"
            )
        found[down, across] = float(x)
    grid = [[found.get((down, across), math.nan) for across in acrosses] for down in downs]
    return downs, acrosses, grid
