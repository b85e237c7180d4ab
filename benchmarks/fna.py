"""Faster Neighborhood Attention (arXiv 2403.04690): tiles in space, and no stored scores.

    python -m benchmarks.fna [--json]

The paper's claims: tiles of the grid visit fewer key tiles than pieces of rows (64 x 64, window 16:
1 of 8.46 against 1 of 4.0), and the fused form needs no `N Π w` scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard import attend
from regard.bench.timing import paired, row, seconds
from regard.patterns.fna import fused_na, na_av, na_qk
from regard.patterns.gna import simulate_tiles
from regard.patterns.neighborhood import Neighborhood

from . import main

H, D = 4, 64


def _qkv(grid: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(math.prod(grid))
    return [torch.randn(1, *grid, H, D, generator=g) for _ in range(3)]


def tiles(side: int = 64) -> list[dict[str, Any]]:
    """Tiled blocks (ours) over the same mask in row order (theirs); `bound` is the ratio of work."""
    rows = []
    q, k, v = (x.flatten(1, 2).transpose(1, 2).contiguous() for x in _qkv((side, side)))
    for window in (16, 7):
        mask = Neighborhood((side, side), window)
        tiled = mask.layout(side**2, block=64)
        # An algebra of masks keeps the order of the tokens.
        plain = (mask | mask).layout(side**2, block=64)
        ours, theirs = paired(
            lambda x=tiled: attend(q, k, v, layout=x),
            lambda x=plain: attend(q, k, v, layout=x),
            repeats=3,
        )
        square, line = (
            simulate_tiles((side, side), window, 1, tile, tile).speedup
            for tile in ((8, 8), (1, 64))
        )
        note = f"model: 8 x 8 tiles visit 1 of {square:.2f}, rows 1 of {line:.2f}"
        bound = plain.listed_pairs() / tiled.listed_pairs()
        rows.append(row(f"{side} x {side}, window {window}", ours, theirs, bound, note))
    return rows


def unfused(side: int = 56, window: int = 7) -> list[dict[str, Any]]:
    """Fused over unfused, and what the unfused form stores."""
    q, k, v = _qkv((side, side))

    def by_windows() -> Tensor:
        return na_av(na_qk(q, k, window).softmax(-1), v, window)

    gap = (fused_na(q, k, v, window) - by_windows()).abs().max().item()
    ours, theirs = paired(lambda: fused_na(q, k, v, window), by_windows, repeats=3)
    stored = 4 * H * side**2 * window**2 / 1e6
    note = f"{stored:.1f} MB of scores against none; gap {gap:.0e}"
    return [row(f"{side} x {side}, window {window}: fused over unfused", ours, theirs, None, note)]


def growth(sides: tuple[int, ...] = (32, 64, 128), window: int = 16) -> list[dict[str, Any]]:
    """Growth with N at one window, as slopes of log over log (stated: 1)."""
    taken, listed = [], []
    for side in sides:
        q, k, v = _qkv((side, side))
        taken.append(seconds(lambda x=(q, k, v): fused_na(*x, window), repeats=3))
        mask = Neighborhood((side, side), window)
        listed.append(mask.layout(side**2, block=(128, 64)).listed_pairs())
    n = [side**2 for side in sides]
    slopes = [math.log(y[-1] / y[-2]) / math.log(n[-1] / n[-2]) for y in (taken, listed)]
    note = f"time grows as N^{slopes[0]:.2f}, listed pairs as N^{slopes[1]:.2f} (stated 1)"
    return [row(f"growth over N={n[-2]}..{n[-1]}, window {window}", taken[-1], note=note)]


if __name__ == "__main__":
    main((tiles, unfused, growth), doc=__doc__)
