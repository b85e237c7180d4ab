"""Radial Attention (arXiv 2506.19852): kept pairs, their growth, and where the pattern approximates.

    python -m benchmarks.radial [--json]

The paper's claims: O(n log n) pairs, and attention of video models decays with the distance in time
and in place so that few are enough. The second holds in a regime, which `approximation` shows on
synthetic scores `-α |i - j| - β |k - l| + 0.3 noise`: slow decay over time and a fast one over places.
Seconds are those of working a figure out.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from regard import Predicate, Sinks
from regard.bench.timing import row
from regard.patterns.radial import radial_block_mask, radial_mask

from . import main


def kept(
    sizes: tuple[tuple[int, int], ...] = ((16, 32), (64, 32), (128, 32), (256, 64)),
) -> list[dict[str, Any]]:
    """Share of pairs that the paper's mask keeps without its sink, and its bound's share."""
    rows = []
    for f, s in sizes:
        start = time.perf_counter()
        mask = radial_mask(f, s, sink=False)
        ratio = mask.pairs() / (4 * s * s * f * math.floor(math.log2(f)))
        note = (
            f"keeps {mask.density(f * s):.3f}, with sink {radial_mask(f, s).density(f * s):.3f}; "
            f"{ratio:.2f} of 4 s^2 f floor(log2 f)"
        )
        bound = 1 / mask.density(f * s)
        rows.append(row(f"kept, {f} frames of {s}", time.perf_counter() - start, None, bound, note))
    return rows


def official(f: int = 16, s: int = 512) -> list[dict[str, Any]]:
    """The official blocks beside the paper's mask, for one size of the golden file."""
    start = time.perf_counter()
    blocks = radial_block_mask(f, s)
    note = (
        f"official blocks keep {float(blocks.blocks.float().mean()):.3f}, "
        f"the paper's mask {radial_mask(f, s).density(f * s):.3f}"
    )
    return [row(f"official, {f} frames of {s}", time.perf_counter() - start, None, None, note)]


def growth(s: int = 256, frames: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)) -> list[Any]:
    """Allowed pairs, and pairs listed by layouts, over n = 1k..64k: slopes beside n log n's own."""
    start = time.perf_counter()
    masks = [radial_mask(f, s) for f in frames]
    sizes = [f * s for f in frames]
    counts = {
        "allowed": [mask.pairs() for mask in masks],
        "listed": [
            m.layout(n, n, (128, 64)).listed_pairs() for m, n in zip(masks, sizes, strict=True)
        ],
        "n log2(n / s) itself": [n * math.log2(n / s) for n in sizes],
    }
    span = math.log(sizes[-1] / sizes[0])
    slopes = [
        f"{name} n^{math.log(x[-1] / x[0]) / span:.2f} (last doubling {math.log2(x[-1] / x[-2]):.2f})"
        for name, x in counts.items()
    ]
    shares = [
        p / (4 * s * stated)
        for p, stated in zip(counts["allowed"], counts["n log2(n / s) itself"], strict=True)
    ]
    note = f"{', '.join(slopes)}; allowed over 4 s n log2(n / s): {min(shares):.2f} to {max(shares):.2f}"
    name = f"growth over n={sizes[0]}..{sizes[-1]}, s={s}"
    return [row(name, time.perf_counter() - start, None, None, note)]


def approximation(f: int = 32, s: int = 16, near: int = 6) -> list[dict[str, Any]]:
    """Relative error of the output against a window over time of about equal cost, by regime."""
    n = f * s
    radial = radial_mask(f, s)
    window = Sinks(s) | Predicate(lambda i, j, h, b: (i // s - j // s).abs() <= near)
    shares = f"radial keeps {radial.density(n):.0%}, ±{near} frames {window.density(n):.0%}"
    frame, place = torch.arange(n) // s, torch.arange(n) % s
    rows = []
    for alpha, beta in ((0.05, 0.3), (0.1, 0.6), (0.3, 0.3), (0.5, 0.1)):
        start = time.perf_counter()
        g = torch.Generator().manual_seed(0)
        scores = -alpha * (frame[:, None] - frame).abs() - beta * (place[:, None] - place).abs()
        scores = scores + 0.3 * torch.randn(n, n, generator=g)
        v = torch.randn(n, 64, generator=g)
        whole = scores.softmax(-1) @ v
        errors = []
        for mask in (radial, window):
            part = scores.masked_fill(~mask.dense(n), -math.inf).softmax(-1) @ v
            errors.append(float((part - whole).norm() / whole.norm()))
        verdict = "radial" if errors[0] < 0.95 * errors[1] else "window"
        verdict = verdict if abs(errors[0] / errors[1] - 1) > 0.05 else "neither"
        note = (
            f"error {errors[0]:.3f} radial, {errors[1]:.3f} window: better is {verdict}; {shares}"
        )
        name = f"approximation, α={alpha} (time), β={beta} (place)"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


if __name__ == "__main__":
    main((kept, official, growth, approximation), doc=__doc__)
