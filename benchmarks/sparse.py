"""Selectors side by side: prefill and decoding against dense SDPA, and the attention mass they keep.

    python -m benchmarks.sparse [--json] [--only prefill|decode] [--recall] [--growth]

Synthetic heads for speed (9 query heads on 3 key heads, width 64, as in SmolLM2): what a selector
finds does not change what it costs. `--recall` takes queries and keys from SmolLM2 itself.
Quality on text is `regard compare --length 8192 --tasks --methods ...`; see benchmarks/sparse.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import Causal, attend
from regard.bench.timing import paired, row, seconds
from regard.core.select import Selector, recall
from regard.models import AttentionCall, Method, patch
from regard.models.method import Inner
from regard.sparse.generic import BlockTopK, ExactTopK, Streaming, VerticalSlash
from regard.sparse.hip import HiP

from . import main
from .counted import slope
from .smollm2_docs import documents

HEADS, KV_HEADS, WIDTH = 9, 3, 64


def _qkv(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    shapes = ((HEADS, n), (KV_HEADS, m), (KV_HEADS, m))
    q, k, v = (torch.randn(1, h, x, WIDTH, generator=generator) for h, x in shapes)
    return q, k, v


def selectors(n: int) -> dict[str, Selector]:
    """Selectors that read about 13.5 % of the keys, 25 % of the pairs of causal attention."""
    keep = max(4, n * 17 // 128 // 64)
    return {
        "streaming": Streaming(keep),
        "mean-topk": BlockTopK(keep),
        "bounds-topk": BlockTopK(keep, summary="bounds"),
        "vertical-slash": VerticalSlash(keep),
        "hip, blocks of 64": HiP((keep - 2) * 64, block_q=64, block_k=64, window=128),
        "hip, blocks of 2": HiP(keep * 64 - 128, window=128),
    }


def prefill(n: int = 8192) -> list[dict[str, Any]]:
    """Choosing and attending of a whole prompt, over causal SDPA."""
    q, k, v = _qkv(n, n)
    rows = []

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for name, selector in selectors(n).items():

        def ours(selector: Selector = selector) -> Tensor:
            return attend(q, k, v, layout=selector.select(q, k))

        taken, theirs = paired(ours, dense, repeats=3)
        choosing = seconds(lambda s=selector: s.select(q, k), repeats=3)  # type: ignore[misc]
        layout = selector.select(q, k)
        shared = layout.index.shape[0] * layout.index.shape[1]
        share = layout.listed_pairs() / shared / (n * (n + 1) / 2)
        note = f"choosing {1e3 * choosing:.1f} ms of it; {share:.0%} of the causal pairs listed"
        rows.append(row(f"prefill, {name}, N={n}", taken, theirs, 1 / share, note))
    return rows


def decode(m: int = 32768, steps: int = 16) -> list[dict[str, Any]]:
    """One token over a cache, states warm, over dense SDPA; `bound` is keys over keys read."""
    q, k, v = _qkv(steps + 1, m + steps)
    rows = []
    tried: dict[str, Selector] = {
        "streaming, 2048 keys": Streaming(32),
        "mean-topk, 2048 keys": BlockTopK(32),
        "bounds-topk, 2048 keys": BlockTopK(32, summary="bounds"),
        "hip, 2048 keys, refresh 8": HiP(1920, block_k=2, window=128, refresh=8),
        "hip, 2048 keys, blocks of 64": HiP(1920, block_q=64, block_k=64, window=128),
    }
    for name, selector in tried.items():
        state = selector.new_state()
        selector.select(q[:, :, :1], k[:, :, :m], state=state)

        def step(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
            def every() -> None:
                # A growing cache: no block divides most of its lengths.
                for t in range(1, steps + 1):
                    fn(q[:, :, t : t + 1], k[:, :, : m + t], v[:, :, : m + t])

            return every

        def ours(
            q: Tensor, k: Tensor, v: Tensor, selector: Selector = selector, state: Any = state
        ) -> Tensor:
            return attend(q, k, v, layout=selector.select(q, k, state=state))

        def choose(
            q: Tensor, k: Tensor, v: Tensor, selector: Selector = selector, state: Any = state
        ) -> Tensor:
            return selector.select(q, k, state=state).index

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        taken, theirs = paired(step(ours), step(dense), repeats=3)
        choosing = seconds(step(choose), repeats=3)
        note = f"choosing {1e3 * choosing / steps:.2f} ms of it"
        rows.append(row(f"decode, {name} of {m}", taken / steps, theirs / steps, m / 2048, note))
    return rows


class _Seen(Method):
    """Keeps queries and keys of some layers."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers, self.kept = layers, dict[int, tuple[Tensor, Tensor]]()

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        if call.layer in self.layers:
            self.kept[call.layer] = call.q, call.k
        return inner(call)


def recall_table(n: int = 4096) -> list[dict[str, Any]]:
    """Share of SmolLM2's attention mass that each selector keeps, at equal density."""
    layers = (2, 10, 20, 28)
    model, windows = documents(1, n)
    seen = _Seen(layers)
    with patch(model, seen), torch.no_grad():
        model.base_model(input_ids=windows[0])
    keep = max(4, n * 17 // 128 // 64)
    rows = []
    for name, selector in {"exact-topk, the oracle": ExactTopK(keep), **selectors(n)}.items():
        kept = []
        density = 0.0
        for q, k in seen.kept.values():
            layout = selector.select(q, k)
            kept.append(float(recall(q, k, layout).mean()))
            lines = layout.index.shape[0] * layout.index.shape[1]
            density += layout.allowed_pairs() / lines / (n * (n + 1) / 2) / len(layers)
        shares = " / ".join(f"{x:.3f}" for x in kept)
        note = f"mass kept in layers {', '.join(map(str, layers))}: {shares}; density {density:.1%}"
        rows.append({**row(f"recall, {name}, N={n}", sum(kept) / len(kept)), "note": note})
    return rows


def growth() -> list[dict[str, Any]]:
    """Seconds of choosing and attending, 1024 keys a query, from 2k to 32k tokens: exponent of N."""
    sizes = (2048, 4096, 8192, 16384, 32768)
    tried: dict[str, Selector] = {
        "streaming": Streaming(16),
        "mean-topk": BlockTopK(16),
        "hip, blocks of 64": HiP(896, block_q=64, block_k=64, window=128),
    }
    rows = []
    for name, selector in tried.items():
        taken = []
        for n in sizes:
            q, k, v = _qkv(n, n)

            def call(selector: Selector = selector, x: Any = (q, k, v)) -> Tensor:
                return attend(*x, layout=selector.select(x[0], x[1], mask=Causal()))

            taken.append(seconds(call, repeats=3))
        note = f"N^{slope(sizes, taken):.2f} from {sizes[0]} to {sizes[-1]}"
        rows.append(row(f"growth, {name}", taken[-1], note=note))
    return rows


if __name__ == "__main__":
    main([prefill, decode], {"recall": recall_table, "growth": growth}, __doc__)
