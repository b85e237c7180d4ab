"""Masks as PNG pictures: queries downwards, keys across, a grid of panels for per-head masks."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from ..core.masks import Mask
from .shares import shares

ACCENT = "#2563a8"
PAPER = "#eef2f7"
MAX_HEADS = 16
# Without the version of matplotlib, so that the same mask gives the same bytes.
_METADATA: Any = {"Software": None}


def mask_png(
    mask: Mask,
    n: int = 64,
    m: int | None = None,
    *,
    path: str | Path | None = None,
    title: str | None = None,
) -> bytes:
    """Draw a mask as a labelled PNG.

    Args:
        mask: what to draw; per-head masks become a grid of at most 16 panels.
        n, m: numbers of queries and keys; ``m`` defaults to ``n``. Long masks are drawn by the
            share of allowed pairs in each of 256 x 256 cells.
        path: also write the PNG to this file.
        title: what stands above the picture, by default the mask's repr.

    Returns:
        The PNG's bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    m = n if m is None else m
    heads = min(mask.heads or 1, MAX_HEADS)
    columns = min(heads, 4)
    rows = -(-heads // columns)
    side = 4.6 if heads == 1 else 2.4
    figure = Figure(figsize=(side * columns + 0.6, side * min(n / m, 2.0) * rows + 1.0), dpi=144)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for at, axes in enumerate(panels.flat):
        if at < heads:
            _panel(axes, mask, n, m, at, labelled=heads == 1)
        else:
            axes.set_axis_off()
    words = title if title is not None else repr(mask)
    shown = f"first {heads} of {mask.heads} heads · " if heads < (mask.heads or 1) else ""
    figure.suptitle(
        f"{_shorten(words)}\n{shown}{mask.density(n, m):.1%} of {n} x {m} pairs",
        fontsize=9,
        # A user's text is not mathematics.
        parse_math=False,
    )
    return png(figure, path)


def png(figure: Any, path: str | Path | None = None) -> bytes:
    """A matplotlib figure, laid out, as the bytes of a PNG, also written to ``path``."""
    figure.tight_layout()
    out = BytesIO()
    figure.savefig(out, format="png", metadata=_METADATA)
    if path is not None:
        Path(path).write_bytes(out.getvalue())
    return out.getvalue()


def _panel(axes: Any, mask: Mask, n: int, m: int, head: int, *, labelled: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("regard", [PAPER, ACCENT])
    grid = shares(mask, n, m, head=head)
    axes.imshow(
        grid.numpy(),
        cmap=colours,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-0.5, m - 0.5, m - 0.5, m - n - 0.5),
        aspect="equal" if 0.2 < n / m <= 1 else "auto",
    )
    axes.tick_params(labelsize=7, length=2)
    for edge in axes.spines.values():
        edge.set_color("#9aa5b1")
    if labelled:
        axes.set_xlabel("key position", fontsize=8)
        axes.set_ylabel("query position", fontsize=8)
    else:
        axes.set_title(f"head {head}", fontsize=8)


def mask_tile(mask: Mask, n: int, m: int | None = None, cells: int = 160) -> bytes:
    """A mask as a bare PNG, one pixel a cell: black, the more opaque the more pairs are allowed.

    Opacity is the square root of the share, so that a few sinks among thousands of keys show.
    A page uses it as a stencil for a colour of its own, so that it fits light and dark alike.
    Per-head masks are averaged over their heads.
    """
    from matplotlib.image import imsave

    heads = mask.heads or 1
    grid = torch.stack([shares(mask, n, m, cells, head) for head in range(heads)]).mean(0)
    pixels = grid.new_zeros((*grid.shape, 4))
    pixels[..., 3] = grid.sqrt()
    out = BytesIO()
    imsave(out, (pixels * 255).round().byte().numpy(), format="png", metadata=_METADATA)
    return out.getvalue()


def _shorten(text: str, width: int = 90) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
