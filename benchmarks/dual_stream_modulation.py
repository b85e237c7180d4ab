"""Dual-stream modulation (arXiv 2501.12206): raised scores of a paragraph's tokens in SmolLM2.

    python -m benchmarks.dual_stream_modulation [--json] [--smollm2]

The paper's claim: boosting the right image tokens reduces hallucination (CHAIR_S 46.2 to 17.6).
`--smollm2` measures the loss of an answer about a paragraph that plays the image, its whole or the
needle's tokens boosted (four minutes). Its cost: one row of scores a step.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import torch

import regard
from regard.bench.timing import row
from regard.models import Spans
from regard.steer.dual_stream_modulation import DualStream

from . import main
from .counted import edited, slope
from .needle_bed import measured, note, prompts, tell
from .small_llama import small_llama


def scores_made(n: int) -> int:
    """Scores edited in a prompt of `n` tokens, whose last row is, on a small Llama."""
    model = small_llama(3, 2 * n)
    spans = Spans.of(n, image=(2, n // 2))
    with (
        edited(DualStream, "_boost") as made,
        torch.no_grad(),
        regard.patch(model, DualStream(), spans=spans),
    ):
        model((torch.arange(n)[None] * 7) % 64)
    return sum(made)


def growth(sizes: tuple[int, ...] = (128, 256, 512, 1024)) -> list[dict[str, Any]]:
    """Scores edited, over the length."""
    start = time.perf_counter()
    counts = [scores_made(n) for n in sizes]
    told = f"grow as M^{slope(sizes, counts):.2f}: {counts[0]:,} to {counts[-1]:,}"
    taken = time.perf_counter() - start
    return [row(f"scores edited by one row, M={sizes[0]}..{sizes[-1]}", taken, note=told)]


def smollm2() -> list[dict[str, Any]]:
    """Loss of the needle with the context, or the needle itself, boosted."""
    among = prompts()
    context = {0.1: ".132", 0.3: ".149", 0.5: ".255"}
    needle = {0.1: ".115", 0.3: ".078", 0.5: ".062"}
    rows = [row("plain", None, note=note(*measured(None, among=among), ".148"))]
    images: tuple[tuple[Literal["context", "needle"], dict[float, str]], ...] = (
        ("context", context),
        ("needle", needle),
    )
    for image, expected in images:
        for alpha, spec in expected.items():
            name = f"{image} boosted, alpha={alpha}"
            tell(name, len(rows), 7)
            found = measured(DualStream(alpha), image, among)
            rows.append(row(name, None, note=note(*found, spec)))
    return rows


if __name__ == "__main__":
    main((growth,), {"smollm2": smollm2}, doc=__doc__)
