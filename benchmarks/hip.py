"""HiP attention (arXiv 2406.09827): language modelling at an equal budget, and growth of its work.

    python -m benchmarks.hip [--json] [--only language|mass|growth]

The paper's claim: without training, blocks found by the tree search keep a model's quality where a
window with attention sinks of the same budget does not. Its cost: O(N log N) for the search, O(N)
pairs. `language` needs SmolLM2 (about a minute). Seconds are those of working a figure out.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import Causal, Mask, Sinks, SlidingWindow
from regard.bench.timing import row
from regard.core.select import recall
from regard.models.calls import AttentionCall
from regard.sparse.hip import HiP, hip_select

from . import main
from .counted import slope
from .smollm2_docs import documents, nll

BUDGET = 96
# The layers that are not dense: all but the first two, as in the measurement of the specification.
LAYERS = range(2, 30)


def _patterns() -> tuple[tuple[str, HiP | Mask], ...]:
    return (
        ("HiP, 64 keys and a window of 32", HiP(64, window=32)),
        ("window of 92 and 4 sinks", Causal() & (SlidingWindow(91) | Sinks(4))),
        ("window of 96", Causal() & SlidingWindow(95)),
    )


@torch.no_grad()
def language(windows: int = 1, length: int = 1024) -> list[dict[str, Any]]:
    """Loss of SmolLM2 with HiP and with static patterns of 96 keys, layers 0 and 1 dense."""
    start = time.perf_counter()
    model, ids = documents(windows, length)
    dense = sum(nll(model, x) for x in ids) / windows
    note = f"{dense:.3f} nats a token over {windows} windows of {length}"
    rows = [row("language: dense", time.perf_counter() - start, None, None, note)]
    for name, pattern in _patterns():
        start = time.perf_counter()
        with regard.patch(model, pattern, layers=LAYERS):
            loss = sum(nll(model, x) for x in ids) / windows
        note = f"{loss:.3f} nats a token, {loss - dense:+.3f} against dense"
        rows.append(row(f"language: {name}", time.perf_counter() - start, None, None, note))
    return rows


class _Kept:
    """Attention mass that each pattern would keep in the layers of a dense model."""

    def __init__(self) -> None:
        self.mass: dict[str, list[float]] = {name: [] for name, _ in _patterns()}

    def attention(self, call: AttentionCall, out: Tensor) -> None:
        if call.layer not in LAYERS:
            return
        n = call.n
        for name, pattern in _patterns():
            if isinstance(pattern, HiP):
                layout = pattern.select(call.q, call.k, mask=call.mask)
            else:
                layout = pattern.layout(n, n, 64)
            share = recall(call.q, call.k, layout, scale=call.scale)
            self.mass[name].append(float(share[:, :, n // 4 :].mean()))

    def result(self) -> dict[str, float]:
        return {name: sum(shares) / len(shares) for name, shares in self.mass.items()}


@torch.no_grad()
def kept_mass(length: int = 1024) -> list[dict[str, Any]]:
    """Share of the true attention mass that the same patterns keep, mean of layers 2 to 29."""
    start = time.perf_counter()
    model, ids = documents(1, length)
    with regard.watch(model, _Kept()) as seen:
        nll(model, ids[0])
    taken = time.perf_counter() - start
    return [
        row(f"mass: {name}", taken, None, None, f"{share:.3f} of the attention mass is kept")
        for name, share in seen.result().items()
    ]


def work(
    sizes: tuple[int, ...], mask_k: int = 64, block_k: int = 2, window: int = 32, width: int = 8
) -> tuple[list[int], list[int]]:
    """Listed pairs, and floating-point operations of the search, for prompts of these lengths."""
    pairs, flops = [], []
    for n in sizes:
        generator = torch.Generator().manual_seed(n)
        q, k = torch.randn(2, 1, 1, n, width, generator=generator)
        with FlopCounterMode(display=False) as counter:
            layout = hip_select(q, k, mask_k=mask_k, block_k=block_k, window=window)
        pairs.append(layout.listed_pairs())
        flops.append(counter.get_total_flops())
    return pairs, flops


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Counted work over N: slopes of log over log beside those of the stated forms."""
    start = time.perf_counter()
    pairs, flops = work(sizes)
    # Rounds double a span's count of blocks: log2 of the keys over the kept ones.
    stated = [n * math.log2(n / 64) for n in sizes]
    shares = [f / s for f, s in zip(flops, stated, strict=True)]
    steps = [f / shares[-1] for f in shares]
    note = (
        f"pairs grow as N^{slope(sizes, pairs):.2f} (stated N), operations of the search as "
        f"N^{slope(sizes, flops):.2f} (stated N log2(N / mask_k): N^{slope(sizes, stated):.2f}); the "
        f"latter over the stated form, last = 1: {', '.join(f'{x:.2f}' for x in steps)}"
    )
    name = f"growth over N={sizes[0]}..{sizes[-1]}, mask_k=64, window=32"
    return [row(name, time.perf_counter() - start, None, None, note)]


if __name__ == "__main__":
    main((language, kept_mass, growth), doc=__doc__)
