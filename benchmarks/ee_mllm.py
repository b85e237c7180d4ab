"""EE-MLLM's composite attention (arXiv 2408.11795): pairs that are scored, and their time.

    python -m benchmarks.ee_mllm [--json] [--time]

The claim: leaving out the products among image tokens, score work falls from (I + T)^2 to T (I + T),
plus I where image tokens attend to themselves; the paper's prefill takes 79 ms in place of 277 ms on an
H800. The counts are of pairs (causal ones: half of the square). `--time` times one layer's attention.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from regard import Causal, attend
from regard.bench.timing import paired, row
from regard.steer import ee_mllm
from regard.steer.ee_mllm import composite_attention, image_alone

from . import main
from .counted import counted, slope


def _pairs(image: int, text: int) -> tuple[int, int]:
    """Allowed pairs of the composite and of the causal mask, image first."""
    n = image + text
    mask = Causal() & image_alone(((0, image),))
    ours, theirs = (int(m.layout(n, n, 64).allowed_pairs()) for m in (mask, Causal()))
    return ours, theirs


def pairs(image: int = 1024, text: int = 64) -> list[dict[str, Any]]:
    """Pairs that one head scores in a prompt."""
    start = time.perf_counter()
    ours, theirs = _pairs(image, text)
    note = f"{ours:,} pairs, causal {theirs:,}: {theirs / ours:.1f} times as many"
    return [row(f"I={image}, T={text}", time.perf_counter() - start, note=note)]


def growth(sizes: tuple[int, ...] = (256, 512, 1024, 2048), text: int = 64) -> list[dict[str, Any]]:
    """Pairs that the fast form computes over the number of image tokens."""
    start = time.perf_counter()
    work, causal = [], []
    for image in sizes:
        q, k, v = torch.zeros(3, 1, 1, image + text, 4)
        with counted(ee_mllm) as count:
            composite_attention(q, k, v, [(0, image)])
        work.append(count.pairs)
        causal.append(_pairs(image, text)[1])
    taken = time.perf_counter() - start
    span = f"I={sizes[0]}..{sizes[-1]}, T={text}"
    return [
        row(
            f"composite, {span}",
            taken,
            note=f"grow as I^{slope(sizes, work):.2f}: {work[0]:,} to {work[-1]:,}",
        ),
        row(f"causal, {span}", taken, note=f"grow as I^{slope(sizes, causal):.2f}"),
    ]


def step_time(image: int = 1024, text: int = 64) -> list[dict[str, Any]]:
    """One layer's attention of a prompt, 9 heads of width 64, against causal attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, image + text, 64, generator=generator)
    ours, theirs = paired(
        lambda: composite_attention(q, k, v, [(0, image)]),
        lambda: attend(q, k, v, mask=Causal()),
    )
    few, many = _pairs(image, text)
    return [row(f"attention, I={image}, T={text}", ours, theirs, many / few, "one layer, 9 heads")]


if __name__ == "__main__":
    main((pairs, growth), {"time": step_time}, doc=__doc__)
