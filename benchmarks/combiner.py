"""Combiner (arXiv 2107.05768): full support at sub-quadratic cost, and what it is good for.

    python -m benchmarks.combiner [--json] [--train]

The paper's claim: every earlier key has positive weight, where the sparse pattern that Combiner is
built on has none; cost O(N (seg + N / seg)) for the fixed and axial forms, O(N log N) for the log
form. `--train` trains two-layer decoders to recall a marked token 16 to 63 places back, once with the
segments alone and once with each of Combiner's patterns (about two
minutes). Seconds are those of
working a figure out, of training in the last rows.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard import Causal, attend
from regard.bench.timing import paired, row
from regard.sparse.combiner import combiner_attention, fold, unfold
from regard.sparse.combiner_probs import combiner_probs, support

from . import main, tiny_recall

PATTERNS = ("fixed", "log", "axial")


def support_rows(n: int = 64, seg: int = 8) -> list[dict[str, Any]]:
    """Keys with positive weight, of all that come no later."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 8, generator=g, dtype=torch.float64) for _ in range(2))
    causal = n * (n + 1) / 2
    rows = []
    for pattern in PATTERNS:
        start = time.perf_counter()
        probs = combiner_probs(q, k, pattern, seg)
        held = int((probs > 0).sum()) / probs.shape[1] / causal
        direct = sum(len(set(support(i, n, pattern, seg)[0])) for i in range(n)) / causal
        note = f"{held:.0%} of the causal pairs have weight; the direct ones alone are {direct:.0%}"
        rows.append(row(f"support: {pattern}", time.perf_counter() - start, None, None, note))
    return rows


def products(n: int, pattern: str, seg: int) -> tuple[int, int]:
    """Products of queries with keys and summaries, and those spent on making the summaries."""
    if pattern == "log":
        # a query reads itself and a region for each bit set; a left block is weighed once a level
        sizes = [1 << bit for bit in range(max(n - 1, 0).bit_length())]
        read = n + sum(_ones(n, size) for size in sizes)
        return read, sum(-(-(n - size) // (2 * size)) * size for size in sizes)
    rows = n // seg
    inside = rows * seg * (seg + 1) // 2
    if pattern == "fixed":
        return inside + seg * rows * (rows - 1) // 2, n
    above = seg * rows * (rows - 1) // 2
    # own row, own column, the other columns above, left and right of it in earlier rows
    read = inside + above + (rows - 1) * seg * (seg - 1) + 2 * (seg - 1) * above // seg
    # causal attention of the pooled queries: down the columns, along the rows in both directions
    return read, seg * rows * (rows + 1) // 2 + 2 * inside


def _ones(n: int, size: int) -> int:
    """How many of `0 .. n - 1` have the bit `size`."""
    whole, rest = divmod(n, 2 * size)
    return whole * size + max(0, rest - size)


def growth(
    sizes: tuple[int, ...] = (1024, 4096, 16384, 65536),
) -> list[dict[str, Any]]:
    """Products over N, `seg = sqrt(N)`: the slope of log over log, against the stated form."""
    rows = []
    for pattern in PATTERNS:
        start = time.perf_counter()
        counts = [sum(products(n, pattern, math.isqrt(n))) for n in sizes]
        slope = math.log(counts[-1] / counts[0]) / math.log(sizes[-1] / sizes[0])
        stated = [n * (math.log2(n) if pattern == "log" else math.sqrt(n)) for n in sizes]
        shares = [c / s for c, s in zip(counts, stated, strict=True)]
        form = "N log2 N" if pattern == "log" else "N^1.5"
        note = (
            f"products grow as N^{slope:.2f}; over {form}: {shares[0]:.2f} to {shares[-1]:.2f}; "
            f"{counts[-1] / (sizes[-1] * (sizes[-1] + 1) / 2):.2%} of causal attention's at the end"
        )
        name = f"growth over N={sizes[0]}..{sizes[-1]}: {pattern}"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


def seconds(n: int = 16384, seg: int = 128) -> list[dict[str, Any]]:
    """Forward pass of one layer against causal attention."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, 64, generator=g) for _ in range(3))
    rows = []
    for pattern in PATTERNS:
        ours, theirs = paired(
            partial(combiner_attention, q, k, v, pattern, seg),
            lambda: attend(q, k, v, mask=Causal()),
            repeats=3,
        )
        bound = n * (n + 1) / 2 / sum(products(n, pattern, seg))
        note = "against regard's causal attention; 4 heads of 64"
        rows.append(row(f"forward, N={n}, seg={seg}: {pattern}", ours, theirs, bound, note))
    return rows


def local(q: Tensor, k: Tensor, v: Tensor, seg: int) -> Tensor:
    """Causal attention inside segments: the pattern that the fixed form is built on."""
    return unfold(attend(*(fold(x, seg) for x in (q, k, v)), mask=Causal()), q.shape[2] // seg)


def recall(steps: int = 600, few: int = 150, seg: int = 8) -> list[dict[str, Any]]:
    """Train small decoders to recall a marked token 16 to 63 places back."""

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q, k, v, mask=Causal())
        return out

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local(q, k, v, seg)

    kinds: list[tuple[str, tiny_recall.Attention, int]] = [
        ("full attention", full, steps),
        (f"segments of {seg} alone", alone, steps),
        (f"Combiner fixed, seg {seg}", _pattern("fixed", seg), steps),
        ("Combiner log", _pattern("log", seg), few),
        (f"Combiner axial, rows of {seg}", _pattern("axial", seg), few),
    ]
    rows = []
    for name, attention, count in kinds:
        start = time.perf_counter()
        share = tiny_recall.train_recall(partial(_every_layer, attention), steps=count)
        note = f"{share:.1%} right after {count} steps (chance {1 / tiny_recall.VALUES:.1%})"
        rows.append(row(f"recall: {name}", time.perf_counter() - start, None, None, note))
    return rows


def _every_layer(attention: tiny_recall.Attention, layer: int) -> tiny_recall.Attention:
    return attention


def _pattern(pattern: str, seg: int) -> tiny_recall.Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return combiner_attention(q, k, v, pattern, seg)

    return attention


if __name__ == "__main__":
    main((support_rows, growth), {"train": recall, "time": seconds}, doc=__doc__)
