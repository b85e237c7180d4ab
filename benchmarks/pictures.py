"""Draws the pictures of docs/patterns.md.

    python -m benchmarks.pictures [--to FOLDER] [--only NAME]

Patterns over a sequence are drawn as masks, queries downwards and keys across. Patterns over a grid
are drawn on the grid: the keys of three queries, which are marked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from regard import Causal, Dilated, Mask, Sinks, SlidingWindow, Strided
from regard.core.grid import GridMask
from regard.patterns.clear import clear_mask
from regard.patterns.flashbias import RankError
from regard.patterns.halonet_mask import Halo
from regard.patterns.neighborhood import Neighborhood
from regard.patterns.power import power_mask
from regard.patterns.radial import radial_mask
from regard.patterns.s2 import s2_mask
from regard.report.pictures import ACCENT, PAPER, mask_png, png

from .flashbias import rank_curves

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
# A second and a third hue beside the report's, told apart without colour vision as well.
COLOURS = (ACCENT, "#c2571a", "#3c8d5a")


def grid_png(
    panels: Sequence[tuple[str, Mask]], grid: tuple[int, int], queries: Sequence[tuple[int, int]]
) -> bytes:
    """Keys of some queries on a grid, one panel a mask; where they share keys, the last one shows.

    Args:
        panels: titles and masks on the grid; text before it is left out of the picture.
        grid: rows and columns.
        queries: rows and columns of the queries, marked by a cross.
    """
    from matplotlib.colors import to_rgb

    figure, axes = _figure(len(panels), 2.9)
    for (title, mask), panel in zip(panels, axes, strict=True):
        first = mask.text_before if isinstance(mask, GridMask) else 0
        keys = first + torch.arange(grid[0] * grid[1])
        image = torch.tensor(to_rgb(PAPER)).repeat(*grid, 1)
        for (y, x), colour in zip(queries, COLOURS, strict=True):
            query = torch.tensor([first + y * grid[1] + x])
            seen = mask.allows(query, keys).view(grid)
            image[seen] = torch.tensor(to_rgb(colour))
        panel.imshow(image.numpy(), interpolation="nearest")
        for y, x in queries:
            panel.plot(x, y, "x", color="white", markersize=5, markeredgewidth=1.5)
        panel.set_title(title, fontsize=8)
        _quiet(panel)
        panel.set_xticks([])
        panel.set_yticks([])
    return png(figure)


def masks_png(panels: Sequence[tuple[str, Mask]], n: int) -> bytes:
    """Several masks over `n` tokens side by side."""
    figure, axes = _figure(len(panels), 2.9)
    for (title, mask), panel in zip(panels, axes, strict=True):
        panel.imshow(mask.dense(n).numpy(), cmap=_shades(), vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(f"{title}\n{mask.density(n):.1%} of the pairs", fontsize=8)
        _quiet(panel)
    return png(figure)


def curves_png(curves: dict[str, list[RankError]]) -> bytes:
    """Rank against error: of the scores dashed, of the output whole."""
    figure, (panel,) = _figure(1, 5.6, 0.62)
    for (name, points), colour in zip(curves.items(), COLOURS, strict=True):
        ranks = [p.rank for p in points]
        # The last rank is exact; rounding is no point of the curve.
        for what, dash in (("output", "-"), ("scores", "--")):
            errors = [getattr(p, what) if getattr(p, what) > 1e-5 else None for p in points]
            panel.plot(ranks, errors, dash, marker=".", color=colour, label=f"{name}: {what}")
    panel.set_xscale("log", base=2)
    panel.set_xticks(ranks[:-1], [str(r) for r in ranks[:-1]])
    panel.set_yscale("log")
    panel.set_xlabel("rank R", fontsize=8)
    panel.set_ylabel("relative error", fontsize=8)
    panel.grid(color=PAPER)
    panel.legend(fontsize=7, frameon=False, handlelength=4)
    _quiet(panel)
    return png(figure)


def _figure(count: int, side: float, shape: float = 1.0) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * count, side * shape + 0.35), dpi=120 if count > 1 else 100)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _quiet(panel: Any) -> None:
    panel.tick_params(labelsize=7, length=2)
    for edge in panel.spines.values():
        edge.set_color("#9aa5b1")


def _shades() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("regard", [PAPER, ACCENT])


_POINTS = ((2, 3), (15, 16), (27, 29))


def neighborhood() -> bytes:
    """Windows at borders, dilated ones, causal axes."""
    grid = (32, 32)
    panels = [
        ("window 11 x 11", Neighborhood(grid, 11)),
        ("window 8 x 8, dilation 3", Neighborhood(grid, 8, 1, 3)),
        ("window 11 x 11, rows causal", Neighborhood(grid, 11, 1, 1, (True, False))),
    ]
    return grid_png(panels, grid, _POINTS)


def gna() -> bytes:
    """Strides from a sliding window to blocks, as masks of one axis."""
    panels = [
        (f"window 16, stride {stride}", Neighborhood((64,), 16, stride)) for stride in (1, 8, 16)
    ]
    return masks_png(panels, 64)


def fna() -> bytes:
    """A 2-D neighbourhood row by row, and with tokens in tiles of the grid."""
    mask = Neighborhood((64, 64), 16)
    rows = mask.dense(mask.points)
    tiles = rows
    for axis, perm in enumerate(mask.layout(mask.points, block=64).perms):
        if perm is not None:
            tiles = tiles.index_select(axis, perm[0, 0])
    figure, axes = _figure(2, 3.4)
    for panel, (title, image) in zip(
        axes, (("row by row", rows), ("tile by tile", tiles)), strict=True
    ):
        shares = torch.nn.functional.avg_pool2d(image[None].float(), 8)[0]
        panel.imshow(shares.numpy(), cmap=_shades(), vmin=0, vmax=1, interpolation="nearest")
        touched = torch.nn.functional.max_pool2d(image[None].float(), 64)[0].mean()
        panel.set_title(f"{title}\n{touched:.0%} of the blocks of 64 x 64 touched", fontsize=8)
        _quiet(panel)
        panel.set_xticks([])
        panel.set_yticks([])
    return png(figure)


def dinat() -> bytes:
    """One stage of DiNAT: local layers and dilated ones in turn."""
    grid = (32, 32)
    panels = [
        (f"window 7 x 7, dilation {dilation}", Neighborhood(grid, 7, 1, dilation))
        for dilation in (1, 2, 4)
    ]
    return grid_png(panels, grid, _POINTS)


def power() -> bytes:
    """Blocks at power-of-two distances."""
    return mask_png(power_mask(4, 2, 1), 128, title="blocks of 4, window 2, one sink block")


def radial() -> bytes:
    """Bands that halve as frames grow apart."""
    return mask_png(radial_mask(16, 16), 256, title="16 frames of 16 tokens")


def s2() -> bytes:
    """Every head its own shard."""
    mask = s2_mask(4, block=4, local_blocks=4, vert_stride=4)
    return mask_png(mask, 128, title="blocks of 4, window 4, every 4th block beyond")


def clear() -> bytes:
    """Circles of three radii."""
    grid = (32, 32)
    panels = [(f"radius {radius}", clear_mask(*grid, radius, 8)) for radius in (4, 8, 12)]
    return grid_png(panels, grid, _POINTS)


def halonet() -> bytes:
    """Blocks and halos."""
    grid = (32, 32)
    panels = [(f"block 8, halo {halo}", Halo(grid, 8, halo)) for halo in (0, 3, 6)]
    return grid_png(panels, grid, _POINTS)


def windows() -> bytes:
    """Patterns of the core that language models use."""
    panels = [
        ("sliding window", Causal() & SlidingWindow(15)),
        ("streaming", Causal() & (SlidingWindow(15) | Sinks(4))),
        ("dilated", Causal() & Dilated(7, 3)),
        ("strided", Causal() & (SlidingWindow(7) | Strided(8))),
    ]
    return masks_png(panels, 64)


def flashbias() -> bytes:
    """Rank against error of a Swin window's bias."""
    return curves_png(rank_curves())


PICTURES: dict[str, Callable[[], bytes]] = {
    drawing.__name__: drawing
    for drawing in (
        windows,
        neighborhood,
        fna,
        gna,
        dinat,
        power,
        radial,
        s2,
        clear,
        halonet,
        flashbias,
    )
}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all pictures, or those whose name holds a word."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder for the PNG files")
    parser.add_argument("--only", default="", metavar="NAME", help="pictures whose name holds NAME")
    options = parser.parse_args(argv)
    options.to.mkdir(parents=True, exist_ok=True)
    for name, drawing in PICTURES.items():
        if options.only in name:
            path = options.to / f"{name}.png"
            path.write_bytes(drawing())
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
