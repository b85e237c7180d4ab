"""Dilated Neighborhood Attention Transformer (arXiv 2209.15001): reach without cost.

    python -m benchmarks.dinat [--json]

The paper's claim: `ℓ` layers with the best dilations see `k^ℓ` positions, without dilation
`ℓ (k - 1) + 1`, and a dilation costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from regard.bench.timing import paired, row, seconds
from regard.patterns.dinat import DilatedNeighborhoodAttention, dinat
from regard.patterns.neighborhood import Neighborhood

from . import main


def receptive_field(length: int, window: int, dilations: tuple[int, ...]) -> int:
    """Positions that the middle one of a line depends on after a layer for each dilation."""
    seen = torch.eye(length, dtype=torch.bool)
    for d in dilations:
        mask = Neighborhood((length,), window, dilation=d).dense(length)
        seen = (seen.float() @ mask.float()) > 0
    return int(seen[length // 2].sum())


def reach(length: int = 243) -> list[dict[str, Any]]:
    """Receptive fields for a window of 3."""
    best = (1, 3, 9, 27)
    grown = [receptive_field(length, 3, best[: at + 1]) for at in range(4)]
    plain = receptive_field(length, 3, (1, 1, 1, 1))
    taken = seconds(lambda: receptive_field(length, 3, best), repeats=1)
    note = f"dilations 1, 3, 9, 27 see {', '.join(map(str, grown))}; four plain layers {plain}"
    return [row("receptive field, window 3", taken, note=note)]


def dilation(side: int = 56, dim: int = 64) -> list[dict[str, Any]]:
    """A layer of level 1 with a dilation of 8 (ours) over one without (theirs)."""
    torch.manual_seed(0)
    x = torch.randn(1, side, side, dim)
    spread = DilatedNeighborhoodAttention(dim, dim // 32, 7, side // 7).eval()
    near = DilatedNeighborhoodAttention(dim, dim // 32, 7, 1).eval()
    with torch.no_grad():
        ours, theirs = paired(lambda: spread(x), lambda: near(x), repeats=3)
    note = "dilated over not dilated: 1 means that it costs nothing"
    return [row(f"{side} x {side}, window 7, dilation {side // 7}", ours, theirs, 1.0, note)]


def model(name: str = "dinat_mini") -> list[dict[str, Any]]:
    """One image through a whole model."""
    torch.manual_seed(0)
    net, image = dinat(name).eval(), torch.randn(1, 3, 224, 224)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    with torch.no_grad():
        taken = seconds(lambda: net(image), repeats=3)
    return [row(f"{name}, 224 x 224", taken, note=f"{size:.1f} M parameters")]


if __name__ == "__main__":
    main((reach, dilation, model), doc=__doc__)
