"""Combiner (arXiv 2107.05768): full support at sub-quadratic cost, and what it is good for.

    python -m benchmarks.combiner [--json] [--only support|growth] [--train] [--letters]

The paper's claim: every earlier key has positive weight, where the sparse pattern that Combiner is
built on has none; cost O(N (seg + N / seg)) for the fixed and axial forms, O(N log N) for the log
form. `--train` trains two-layer decoders to recall a marked token 16 to 63 places back, once with the
segments alone and once with each of Combiner's patterns (about two minutes). `--letters` trains them on
the characters of a text, where 300 steps do not tell them apart. Seconds are those of working a
figure out, of training in the rows of `--train` and `--letters`.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard import Causal, attend
from regard.bench.timing import paired, row
from regard.core.rope import rope
from regard.sparse.combiner import combiner_attention, fold, unfold
from regard.sparse.combiner_probs import combiner_probs, support

from . import main, tiny_recall
from .counted import slope
from .tiny_letters import letters_loss

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
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Products over N beside the stated forms; `seg` is the power of two that is no less than sqrt(N)
    and divides N."""
    rows = []
    segments = [1 << ((n - 1).bit_length() + 1) // 2 for n in sizes]
    for pattern in PATTERNS:
        start = time.perf_counter()
        pairs = list(zip(sizes, segments, strict=True))
        counts = [sum(products(n, pattern, seg)) for n, seg in pairs]
        stated = [n * (math.log2(n) if pattern == "log" else seg + n / seg) for n, seg in pairs]
        shares = [c / s for c, s in zip(counts, stated, strict=True)]
        form = "N log2 N" if pattern == "log" else "N (seg + N / seg)"
        note = (
            f"products grow as N^{slope(sizes, counts):.2f}; stated {form}, "
            f"N^{slope(sizes, stated):.2f}, of which they are {shares[0]:.2f} to {shares[-1]:.2f}; "
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


class _Rotary(nn.Module):
    """Projections and rotary positions around a function `(q, k, v) -> out`, four heads of 16."""

    def __init__(self, attention: tiny_recall.Attention) -> None:
        super().__init__()
        self.attention = attention
        self.qkv, self.out = nn.Linear(64, 3 * 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        places = torch.arange(x.shape[1])
        q, k = rope(q, places), rope(k, places)
        out: Tensor = self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def letters(seg: int = 32, steps: int = 300, length: int = 256) -> list[dict[str, Any]]:
    """Train small decoders on characters of text, with segments alone and with their summaries."""
    kinds: list[tuple[str, tiny_recall.Attention]] = [
        (f"segments of {seg} alone", partial(local, seg=seg)),
        (f"Combiner fixed, seg {seg}", _pattern("fixed", seg)),
    ]
    rows = []
    for name, attention in kinds:
        start = time.perf_counter()
        loss = letters_loss(lambda _, a=attention: _Rotary(a), steps=steps, length=length)
        note = f"{loss:.3f} nats a character after {steps} steps, N={length}"
        rows.append(row(f"letters: {name}", time.perf_counter() - start, None, None, note))
    return rows


if __name__ == "__main__":
    main(
        (support_rows, growth),
        {"train": recall, "letters": letters, "time": seconds},
        doc=__doc__,
    )
