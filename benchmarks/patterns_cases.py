"""The patterns that `benchmarks/patterns.py` measures, and how the cost of each should grow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from regard import Causal, Mask, Sinks, SlidingWindow, attend
from regard.patterns.clear import clear_mask
from regard.patterns.halonet import halo_attention
from regard.patterns.halonet_mask import Halo
from regard.patterns.neighborhood import Neighborhood, neighborhood_attention
from regard.patterns.power import power_mask
from regard.patterns.radial import radial_mask
from regard.patterns.radial_parts import radial_attention
from regard.patterns.s2 import s2_attention, s2_mask

HEADS = 8


@dataclass(frozen=True)
class Case:
    """A pattern at one length.

    Attributes:
        causal: hold it against causal attention.
        call: the system's own function of `q, k, v`, where it knows more than
            `attend(mask=mask)`; `through` is its name.
    """

    name: str
    mask: Mask
    tokens: int
    causal: bool = False
    call: Callable[[Tensor, Tensor, Tensor], Any] | None = None
    through: str = ""

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """Attention under the pattern, as its user would call it."""
        return attend(q, k, v, mask=self.mask) if self.call is None else self.call(q, k, v)


def speed_cases(quick: bool = False) -> list[Case]:
    """Every pattern at 8192 to 9472 tokens; `quick` at some hundreds.

    Windows are a quarter of the extent or so, as in the papers' image and video models; the tiled
    one is set so that tiles fit (perfectly block-sparse, arXiv 2504.16922).
    """
    side, n, frames, block = (32, 1024, 8, 32) if quick else (96, 8192, 32, 256)
    square, s = side * side, side // 4
    video = (16, s, s)
    return [
        Case(f"neighborhood 1-D, window {n // 16}", Neighborhood((n,), n // 16), n),
        Case(f"neighborhood 2-D, window {s} x {s}", Neighborhood((side, side), s), square),
        Case(
            f"neighborhood 3-D of {' x '.join(map(str, video))}, half of each",
            Neighborhood(video, (8, s // 2, s // 2)),
            math.prod(video),
        ),
        Case(
            f"gna, window {side // 2} x {s}, stride {side // 6} x {side // 12}",
            Neighborhood((side, side), (side // 2, s), (side // 6, side // 12)),
            square,
        ),
        Case(
            f"dilated, window {s} x {s} dilation 2",
            Neighborhood((side, side), s, 1, 2),
            square,
            call=partial(_on_grid, side=side, window=s, dilation=2),
            through="neighborhood_attention",
        ),
        Case(f"power, blocks of {block}", power_mask(block), n, True),
        Case(
            f"radial, {frames} frames of {n // frames}",
            radial_mask(frames, n // frames),
            n,
            call=partial(radial_attention, mask=radial_mask(frames, n // frames)),
            through="radial_attention",
        ),
        Case(
            "s2, 8 heads, stride 8",
            s2_mask(HEADS, block=block // 4, local_blocks=16, vert_stride=8),
            n,
            True,
            partial(s2_attention, block=block // 4, local_blocks=16, vert_stride=8),
            "s2_attention",
        ),
        Case(
            f"clear, radius {side // 6}, {n // 32} text tokens",
            clear_mask(side, side, side // 6, n // 32),
            square + n // 32,
        ),
        Case(
            "halonet, block 8, halo 3",
            Halo((side, side), 8, 3),
            square,
            call=partial(_halo, side=side),
            through="halo_attention",
        ),
        Case(f"sliding window {n // 16}", Causal() & SlidingWindow(n // 16 - 1), n, True),
        Case(
            f"streaming, window {n // 16} and 4 sinks",
            Causal() & (SlidingWindow(n // 16 - 1) | Sinks(4)),
            n,
            True,
        ),
    ]


def _on_grid(q: Tensor, k: Tensor, v: Tensor, *, side: int, window: int, dilation: int) -> Tensor:
    rows = (x.transpose(1, 2).unflatten(1, (side, side)) for x in (q, k, v))
    out: Tensor = neighborhood_attention(*rows, window, dilation=dilation)
    return out.flatten(1, 2).transpose(1, 2)


def _halo(q: Tensor, k: Tensor, v: Tensor, *, side: int) -> Tensor:
    return halo_attention(*(x.unflatten(2, (side, side)) for x in (q, k, v)), 8, 3).flatten(2, 3)


def _square(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    return side, side


def _linear(n: int) -> float:
    return float(n)


# name: (mask of so many tokens, heads, stated work, the same in words)
GROWTH: dict[str, tuple[Callable[[int], Mask], int, Callable[[int], float], str]] = {
    "neighborhood 1-D, window 256": (lambda n: Neighborhood((n,), 256), 1, _linear, "N"),
    "neighborhood 2-D, window 16 x 16": (lambda n: Neighborhood(_square(n), 16), 1, _linear, "N"),
    "neighborhood 3-D, window 4 x 8 x 8": (
        lambda n: Neighborhood((n // 256, 16, 16), (4, 8, 8)),
        1,
        _linear,
        "N",
    ),
    "gna, window 16 x 16 stride 8": (lambda n: Neighborhood(_square(n), 16, 8), 1, _linear, "N"),
    "dilated, window 8 x 8 dilation 4": (
        lambda n: Neighborhood(_square(n), 8, 1, 4),
        1,
        _linear,
        "N",
    ),
    "power, blocks of 64": (
        lambda n: power_mask(64),
        1,
        lambda n: n * (5 + math.log2(n / 64)),
        "N (W + log N)",
    ),
    "radial, 256 tokens a frame": (
        lambda n: radial_mask(n // 256, 256),
        1,
        lambda n: n * math.log2(n / 256),
        "N log N",
    ),
    "s2, 8 heads, stride 8": (
        lambda n: s2_mask(HEADS, block=64, local_blocks=4, vert_stride=8),
        HEADS,
        lambda n: n * (4 + n / (2 * 8 * 64)),
        "N (w + N / 2 v c)",
    ),
    "clear, radius 8, 64 text tokens": (
        lambda n: clear_mask(*_square(n), 8, 64),
        1,
        _linear,
        "N",
    ),
    "halonet, block 8, halo 3": (lambda n: Halo(_square(n), 8, 3), 1, _linear, "N"),
    "sliding window 256": (lambda n: Causal() & SlidingWindow(255), 1, _linear, "N"),
    "streaming, window 256 and 4 sinks": (
        lambda n: Causal() & (SlidingWindow(255) | Sinks(4)),
        1,
        _linear,
        "N",
    ),
}
