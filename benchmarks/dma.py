"""Dynamic mask attention (arXiv 2508.02124): recall beyond a window, and the growth of its cost.

    python -m benchmarks.dma [--json] [--train] [--letters]

The paper's claim: a mask made from the content finds what a window of the same width cannot. `--train`
trains small decoders from scratch with each (about two minutes) to recall the last of three marked
tokens. `--letters` trains them to predict the next character of a text, where the paper's claim of a
better language model does not show: after 300 steps the window of the same width is ahead (some
minutes). Its cost: O(N w D) for attention and O(N Hkv^2 D) for the scores; the KV cache is not reduced.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard import Causal, SlidingWindow, attend
from regard.bench.timing import row
from regard.core.masks import Mask
from regard.core.rope import rope
from regard.sparse.dma import (
    DynamicMaskAttention,
    DynamicMaskCache,
    dynamic_mask,
    dynamic_mask_attention,
)
from regard.sparse.dma_mask import KeptKeys

from . import main
from .counted import slope
from .tiny_letters import letters_loss
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
    # The first rows have fewer than w keys.
    stated = [n * window - window * (window - 1) // 2 for n in sizes]
    dense = sizes[-1] * (sizes[-1] + 1) // 2
    note = (
        f"pairs grow as N^{slope(sizes, pairs):.2f} (stated N w less the first rows' share: "
        f"N^{slope(sizes, stated):.2f}): {pairs[0]:,} to {pairs[-1]:,}, "
        f"{pairs[-1] / sizes[-1]:.0f} a row; w={window}"
    )
    rows = [row(f"prompt, N={sizes[0]}..{sizes[-1]}", taken, None, dense / pairs[-1], note)]
    note = (
        f"{step[0]} to {step[-1]} keys, M^{slope(sizes, step):.2f} (stated w, M^0); every key stays in "
        "the cache"
    )
    rows.append(row(f"decoding step, M={sizes[0]}..{sizes[-1]}", taken, None, None, note))
    return rows


class _Layer(nn.Module):
    """The layer with its scores or with a mask instead, and with rotary positions or none."""

    def __init__(self, layer: DynamicMaskAttention, mask: Mask | None, rotary: bool) -> None:
        super().__init__()
        self.layer, self.mask, self.rotary = layer, mask, rotary

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        q, k, v = layer.project(x)
        if self.rotary:
            places = torch.arange(x.shape[1])
            q, k = rope(q, places), rope(k, places)
        out: Tensor
        if self.mask is None:
            out = dynamic_mask_attention(q, k, v, layer.delta(v), layer.window)
        else:
            out = attend(q, k, v, mask=self.mask)
        return layer.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _cases(
    window: int, width: int = 64, heads: int = 4, rotary: bool = False
) -> list[tuple[str, Callable[[int], nn.Module]]]:
    """The layer with its mask, with a window as wide, and with none."""

    def layer(mask: Mask | None) -> _Layer:
        made = DynamicMaskAttention(width, heads, heads // 2, window, bias=True)
        return _Layer(made, mask, rotary)

    return [
        (f"dynamic mask, w={window}", lambda _: layer(None)),
        (f"sliding window of {window}", lambda _: layer(Causal() & SlidingWindow(window - 1))),
        ("full", lambda _: layer(Causal())),
    ]


def recall(
    window: int = 8, steps: int = 600, width: int = 64, heads: int = 4
) -> list[dict[str, Any]]:
    """Train a decoder with each attention to recall the last of three marked tokens, N=64."""
    rows = []
    for name, make in _cases(window, width, heads):
        print(f"  {name}", file=sys.stderr)
        start = time.perf_counter()
        share = train_recall(
            make_layer=make, task=Recall(marks=3), steps=steps, width=width, heads=heads
        )
        note = f"{share:.1%} right after {steps} steps (chance {1 / VALUES:.1%})"
        rows.append(row(f"recall: {name}", time.perf_counter() - start, None, None, note))
    return rows


def letters(window: int = 32, steps: int = 300, length: int = 256) -> list[dict[str, Any]]:
    """Train a decoder with each attention on characters of text."""
    rows = []
    for name, make in _cases(window, rotary=True):
        print(f"  {name}", file=sys.stderr)
        start = time.perf_counter()
        loss = letters_loss(make, steps=steps, length=length)
        note = f"{loss:.3f} nats a character after {steps} steps, N={length}"
        rows.append(row(f"letters: {name}", time.perf_counter() - start, None, None, note))
    return rows


if __name__ == "__main__":
    main((growth,), {"train": recall, "letters": letters}, doc=__doc__)
