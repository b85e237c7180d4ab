"""Generalized Neighborhood Attention (arXiv 2504.16922): the best possible speed-up, and the measured.

    python -m benchmarks.gna [--json]

The paper's claim: its analytical model says how fast a stride can make a window (FLUX at 4K 10.24,
HunyuanVideo 11.11, both all that the FLOPs allow), and end to end 1.88 and 2.23 times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.timing import paired, row, seconds
from regard.core.attend import plan
from regard.patterns.gna import flop_bound, simulate
from regard.patterns.neighborhood import Neighborhood, neighborhood_attention

from . import main

H, D = 4, 64


def _qkv(grid: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(math.prod(grid))
    return [torch.randn(1, *grid, H, D, generator=g) for _ in range(3)]


def model() -> list[dict[str, Any]]:
    """The analytical model on the paper's two settings; seconds are those of the model itself."""
    flux: dict[str, Any] = {"q_tile": (16, 16), "kv_tile": (16, 8), "share": 0.518}
    video: dict[str, Any] = {"q_tile": (16, 8, 2), "kv_tile": (2, 8, 8), "share": 0.607}
    settings: list[tuple[str, tuple[int, ...], Any, tuple[int, ...], dict[str, Any]]] = [
        ("FLUX 4K", (256, 256), 80, (1, 1), flux),
        ("FLUX 4K", (256, 256), 80, (16, 1), flux),
        ("FLUX 4K", (256, 256), 80, (16, 16), flux),
        ("HunyuanVideo", (30, 48, 80), (18, 24, 24), (16, 8, 8), video),
    ]
    rows = []
    for name, grid, window, stride, options in settings:
        found = simulate(grid, window, stride, **options)
        note = (
            f"model {found['speedup']:.2f} of {found['flop_bound']:.2f}"
            f"{', perfectly block-sparse' if found['perfectly_block_sparse'] else ''}; "
            f"end to end {found['end_to_end']:.2f}"
        )
        taken = seconds(
            lambda x=(grid, window, stride, options): simulate(*x[:3], **x[3]), repeats=1
        )
        rows.append(row(f"{name}, stride {' x '.join(map(str, stride))}", taken, note=note))
    return rows


def measured(side: int = 96, window: int = 24) -> list[dict[str, Any]]:
    """A window without and with strides, over dense attention; `bound` is what the FLOPs allow."""
    q, k, v = _qkv((side, side))
    flat = [x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v)]
    rows = []
    for stride in (1, 8, window):
        ours, theirs = paired(
            lambda s=stride: neighborhood_attention(q, k, v, window, stride=s),
            lambda: F.scaled_dot_product_attention(*flat),
            repeats=3,
        )
        mask = Neighborhood((side, side), window, stride)
        read = plan(*flat, mask=mask, backend="blocks").density
        assert read is not None
        note = f"over dense attention; the pairs that are read allow {1 / read:.2f}"
        bound = flop_bound((side, side), window, stride)
        name = f"{side} x {side}, window {window}, stride {stride}"
        rows.append(row(name, ours, theirs, bound, note))
    return rows


def natten(side: int = 48, window: int = 12) -> list[dict[str, Any]]:
    """Against NATTEN's FlexAttention backend on the same grid, where it is installed."""
    try:
        from natten.functional import na2d
    except ImportError:
        return []
    rows = []
    q, k, v = _qkv((side, side))
    for stride in (1, 4):
        ours, theirs = paired(
            lambda s=stride: neighborhood_attention(q, k, v, window, stride=s),
            lambda s=stride: na2d(q, k, v, kernel_size=window, stride=s, backend="flex-fna"),
            repeats=3,
        )
        name = f"{side} x {side}, window {window}, stride {stride}"
        rows.append(row(name, ours, theirs, None, "over NATTEN, flex-fna, not compiled"))
    return rows


if __name__ == "__main__":
    main((model, measured, natten), doc=__doc__)
