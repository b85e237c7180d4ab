"""Landmark Attention (arXiv 2305.16300): recall through few blocks, and what a token reads.

    python -m benchmarks.landmark [--json] [--train]

The claim: a model trained with landmarks needs only a few blocks of its past. `--train` trains a small
decoder on recall of the last of three marked tokens with the grouped softmax, then reads its test
sequences token by token through the cache: all blocks, the best two, the best one, two at random.
The cost: training computes all pairs, a token at inference reads `topk` blocks, its own text and one
landmark a block.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from regard.bench.timing import row
from regard.core import row_blocks
from regard.sparse import landmark
from regard.sparse.landmark import landmark_attention
from regard.sparse.landmark_cache import LandmarkCache

from . import main
from .counted import counted, slope
from .tiny_recall import Recall, accuracy, train


def _tokens(n: int, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, n, width, generator=generator)
    return q, k, v


def growth_training(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Pairs of the grouped softmax over whole sequences, blocks of 50 and a landmark."""
    start, work = time.perf_counter(), []
    for n in sizes:
        with counted(landmark) as count:
            landmark_attention(*_tokens(n), torch.arange(n) % 51 == 50)
        work.append(count.pairs)
    dense = sizes[-1] * (sizes[-1] + 1) / 2
    note = (
        f"pairs grow as N^{slope(sizes, work):.2f} (stated N^2); at {sizes[-1]} "
        f"{work[-1] / dense:.2f} of those of causal attention"
    )
    name = f"growth, training, N={sizes[0]}..{sizes[-1]}"
    return [row(name, time.perf_counter() - start, None, None, note)]


def growth_decoding(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
    topk: int = 4,
    segment: int = 1020,
) -> list[dict[str, Any]]:
    """What one more token reads behind a past of N, blocks of 50 and a landmark."""
    start, pairs, marks = time.perf_counter(), [], []
    cache = LandmarkCache(50, topk)
    for n in sizes:
        while cache.length < n:
            t = min(segment, n - cache.length)
            here = torch.arange(cache.length, cache.length + t) % 51 == 50
            cache.attend(*_tokens(t), here)
        marks.append(cache.blocks)
        here = torch.tensor([cache.length % 51 == 50])
        with counted(landmark, row_blocks) as count:
            cache.attend(*_tokens(1), here)
        pairs.append(count.pairs)
    work = [a + b for a, b in zip(pairs, marks, strict=True)]
    # The own block is of another length each time.
    stated = [n // 51 + topk * 50 + n % 51 + 1 for n in sizes]
    note = (
        f"{', '.join(map(str, pairs))} keys read and {', '.join(map(str, marks))} landmarks looked at "
        f"(N^{slope(sizes, marks):.2f}, stated N / f; together N^{slope(sizes, work):.2f}, stated "
        f"N / f + k f + local, N^{slope(sizes, stated):.2f}); dense reads N: "
        f"{sizes[-1] / work[-1]:.0f} times as much"
    )
    name = f"growth, decoding, N={sizes[0]}..{sizes[-1]}, top {topk}"
    return [row(name, time.perf_counter() - start, None, sizes[-1] / work[-1], note)]


class _Reads:
    """The attention of one layer: all blocks at once in training, through a cache afterwards."""

    def __init__(self, task: Recall) -> None:
        self.marks, self.every = task.landmarks(), task.every
        self.topk: int | None = None
        self.mode = "token_head"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.topk is None:
            out: Tensor = landmark_attention(q, k, v, self.marks)
            return out
        generator = torch.Generator().manual_seed(0)
        # The model has learned positions in its tokens and no rotary ones: nothing to move.
        cache = LandmarkCache(self.every, self.topk, self.mode, base=None, generator=generator)
        steps = range(q.shape[2])
        return torch.cat(
            [
                cache.attend(*(x[:, :, t : t + 1] for x in (q, k, v)), self.marks[t : t + 1])
                for t in steps
            ],
            2,
        )


def recall(steps: int = 600, trials: int = 512) -> list[dict[str, Any]]:
    """Recall of the last of three marked tokens, N=64, blocks of 8, two layers."""
    start, task, layers = time.perf_counter(), Recall(marks=3, every=8), []

    def make(_: int) -> _Reads:
        layers.append(_Reads(task))
        return layers[-1]

    model = train(make, task=task, steps=steps)
    seconds = time.perf_counter() - start
    share = accuracy(model, task, trials=trials)
    rows = [
        row("recall, all blocks at once", seconds, None, None, f"{share:.1%} right (chance 6.2%)")
    ]
    blocks = int(task.landmarks().sum())
    for name, topk, mode in (
        (f"all {blocks} blocks through the cache", blocks, "token_head"),
        ("the best 2 blocks", 2, "token_head"),
        ("the best block", 1, "token_head"),
        ("2 random blocks", 2, "random"),
    ):
        start = time.perf_counter()
        for layer in layers:
            layer.topk, layer.mode = topk, mode
        share = accuracy(model, task, trials=trials)
        note = f"{share:.1%} right"
        rows.append(row(f"recall, {name}", time.perf_counter() - start, None, None, note))
    return rows


if __name__ == "__main__":
    main((growth_training, growth_decoding), {"train": recall}, doc=__doc__)
