"""Dynamic mask attention (arXiv 2508.02124): recall beyond a window, and the growth of its cost.

    python -m benchmarks.dma [--json] [--train]

The paper's claim: a mask made from the content finds what a window of the same width cannot. `--train`
trains small decoders from scratch with each (about two minutes) to recall the last of three marked
tokens. Its cost: O(N w D) for attention and O(N Hkv^2 D) for the scores; the KV cache is not reduced.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard import Causal, SlidingWindow, attend
from regard.bench.timing import row
from regard.core.masks import Mask
from regard.sparse.dma import DynamicMaskAttention, DynamicMaskCache, dynamic_mask
from regard.sparse.dma_mask import KeptKeys

from . import main
from .tiny_recall import VALUES, Recall, train_recall


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536), window: int = 256
) -> list[dict[str, Any]]:
    """Listed pairs of query and key over N, of a prompt and of a decoding step."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    pairs, step = [], []
    for n in sizes:
        mask = dynamic_mask(torch.rand(1, 1, n, generator=generator), window)
        assert isinstance(mask, KeptKeys)
        pairs.append(mask.lists(n, n).listed_pairs())
        cache = DynamicMaskCache()
        cache.append(*(torch.zeros(1, 1, n, 1),) * 2, torch.rand(1, 1, n, generator=generator))
        layout = cache.step(window)
        assert layout is not None
        step.append(layout.listed_pairs())
    taken = time.perf_counter() - start
    slope = math.log(pairs[-1] / pairs[0]) / math.log(sizes[-1] / sizes[0])
    dense = sizes[-1] * (sizes[-1] + 1) // 2
    note = (
        f"pairs grow as N^{slope:.2f}: {pairs[0]:,} to {pairs[-1]:,}, "
        f"{pairs[-1] / sizes[-1]:.0f} a row; w={window}"
    )
    rows = [row(f"prompt, N={sizes[0]}..{sizes[-1]}", taken, None, dense / pairs[-1], note)]
    note = f"{step[0]} to {step[-1]} keys, whatever M is; every key stays in the cache"
    rows.append(row(f"decoding step, M={sizes[0]}..{sizes[-1]}", taken, None, None, note))
    return rows


class _Masked(nn.Module):
    """The same layer with a mask of positions instead of scores."""

    def __init__(self, layer: DynamicMaskAttention, mask: Mask) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer.project(x)
        out: Tensor = attend(q, k, v, mask=self.mask)
        return self.layer.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def recall(
    window: int = 8, steps: int = 600, width: int = 64, heads: int = 4
) -> list[dict[str, Any]]:
    """Train a decoder with each attention to recall the last of three marked tokens, N=64."""

    def layer() -> DynamicMaskAttention:
        return DynamicMaskAttention(width, heads, heads // 2, window, bias=True)

    cases: list[tuple[str, Callable[[int], nn.Module]]] = [
        (f"dynamic mask, w={window}", lambda _: layer()),
        (
            f"sliding window of {window}",
            lambda _: _Masked(layer(), Causal() & SlidingWindow(window - 1)),
        ),
        ("full", lambda _: _Masked(layer(), Causal())),
    ]
    rows = []
    for name, make in cases:
        print(f"  {name}", file=sys.stderr)
        start = time.perf_counter()
        share = train_recall(
            make_layer=make, task=Recall(marks=3), steps=steps, width=width, heads=heads
        )
        note = f"{share:.1%} right after {steps} steps (chance {1 / VALUES:.1%})"
        rows.append(row(f"recall: {name}", time.perf_counter() - start, None, None, note))
    return rows


if __name__ == "__main__":
    main((growth,), {"train": recall}, doc=__doc__)
