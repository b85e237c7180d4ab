"""PowerAttention: a causal block mask with blocks at power-of-two distances.

Chen et al., "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse
Attention", arXiv 2503.03588, Algorithm 1. With blocks of `c` tokens and `β = i//c - j//c`, query
`i` sees key `j <= i` when

    β < W   or   β is 0 or a power of two   or   j//c < sink_blocks

so that a row reads O(W + log N) blocks, and `d` layers reach every block within distance `2^d - 1`
without gaps (further blocks where their distance has at most `d` one-bits).

The paper's setting: `c = 256`, `W = 5`, one sink block, the same mask in every head. Its hybrid in
the RULER runs keeps 2 layers of full attention in every 7. A cache cannot drop what lies between
the powers: a block that no row reads now stands at a power-of-two distance later.

No official code was found; this follows the paper's pseudocode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.layout import BlockLayout, Index
from regard.core.masks import Mask

CARD = Card(
    key="power",
    title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    arxiv="2503.03588",
    family="kernel",
    entry="regard.patterns.power:power_attention",
    definition="tests/patterns/test_power.py::test_is_the_papers_algorithm",
    oracle="python -m tests.golden tests/golden/data/power.npz",
    claim="python -m benchmarks.power",
    cost="python -m benchmarks.power --only growth",
    note="Distances count blocks, not tokens; no official code, the paper's Algorithm 1.",
)


@dataclass(frozen=True)
class Power(Mask):
    """PowerAttention's mask (Algorithm 1), causal, the same in every head.

    Args:
        block: `c`, tokens a block.
        window: `W`, blocks of the local window, the query's own among them.
        sink_blocks: leading blocks that every query sees; 0 for none.

    Raises:
        ValueError: a size below 1, or `sink_blocks` below 0.
    """

    block: int = 256
    window: int = 5
    sink_blocks: int = 1

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("window", 1), ("sink_blocks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Power: {name} must be an integer >= {least}, got {value!r}")

    closed = True
    constant = True

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if n > m:
            raise ValueError(
                f"Power: needs as many keys as queries at least, got {n} queries and {m} keys"
            )

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        c = self.block
        beta = i // c - j // c
        near = (beta < self.window) | (beta & (beta - 1) == 0) | (j < self.sink_blocks * c)
        # The bit test means nothing for negative distances; causality removes those.
        return (j <= i) & near

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Exact for every rectangle, aligned to the blocks or not."""
        c, w, sinks = self.block, self.window, self.sink_blocks
        a0, a1, b0, b1 = i0 // c, i1 // c, j0 // c, j1 // c
        # Block distances of the rectangle's causal pairs: all integers from low to high.
        low, high = (a0 - b1).clamp(min=0), a1 - b0
        some = (j0 <= i1) & ((low < w) | (_power_below(high) >= low) | (b0 < sinks))
        # Pairs whose key is no sink; the first distance beyond the window must be a power of two
        # and the last one, or 1 with 2 after it.
        high = a1 - b0.clamp(min=sinks)
        first = low.clamp(min=w)
        lone = (first == high) & (first & (first - 1) == 0)
        pair = (first == 1) & (high == 2)
        return some, (j1 <= i0) & ((b1 < sinks) | (high < first) | lone | pair)

    def layout(
        self,
        n: int,
        m: int | None = None,
        block: int | tuple[int, int] = 128,
        *,
        device: Any = None,
    ) -> BlockLayout:
        """As :meth:`Mask.layout`, from the O(W + log m) distances of a row instead of all blocks."""
        m = n if m is None else m
        self.check(n, m)
        bq, bk = (block, block) if isinstance(block, int) else block
        c = self.block
        i0 = torch.arange(0, n, bq, device=device)[:, None]
        i1 = (i0 + bq).clamp(max=n) - 1 + m - n
        i0 = i0 + m - n
        # (smallest, largest) distance of each stretch of key blocks.
        ranges = [(0, self.window - 1)]
        ranges += [(1 << e, 1 << e) for e in range((max(m - 1, 0) // c).bit_length())]
        low, high = torch.tensor(ranges, device=device).unbind(-1)
        first = (i0 // c - high).clamp(min=0) * c // bk
        last = ((i1 // c - low + 1) * c - 1).clamp(max=m - 1)
        last = torch.div(last, bk, rounding_mode="floor")
        if self.sink_blocks:
            end = min(self.sink_blocks * c, m) - 1
            first = torch.cat([first, torch.zeros_like(i0)], -1)
            last = torch.cat([last, torch.full_like(i0, max(end, 0) // bk)], -1)
        width = int((last - first).max()) + 1 if first.numel() and m else 0
        listed = first[..., None] + torch.arange(max(width, 0), device=device)
        listed = torch.where(listed <= last[..., None], listed, -1).flatten(1)
        return BlockLayout.from_index(listed[None, None], n, m, (bq, bk), self)


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two that is at most ``x``, 0 for ``x < 1``."""
    x = x.clamp(min=0)
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return x - (x >> 1)


def power_mask(block: int = 256, window: int = 5, sink_blocks: int = 1) -> Power:
    """:class:`Power` with the paper's defaults, to be combined with other masks."""
    return Power(block, window, sink_blocks)


def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int = 256,
    window: int = 5,
    *,
    sink_blocks: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Attention under PowerAttention's mask, for a prompt or for the last rows over a cache.

    Args:
        q: `(B, H, N, D)`, the last `N` of `M` positions.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`.
        block, window, sink_blocks: as :class:`Power`.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`.

    Raises:
        ValueError: no queries, more queries than keys, or a size out of range.
    """
    if q.dim() == 4 and q.shape[2] < 1:
        raise ValueError("power_attention: q has no rows, expected N >= 1")
    out: Tensor = attend(q, k, v, mask=Power(block, window, sink_blocks), scale=scale)
    return out
