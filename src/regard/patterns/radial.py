"""Radial Attention: the band of a pair of video frames halves when their distance doubles.

Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
Generation", arXiv 2506.19852. A video of `f` frames of `s` tokens; query `(i, k)` (frame, place in
the frame) sees key `(j, l)` when, with `P = 2^floor(log2 max(|i - j|, 1))`,

    (a)  P <= s  and  |k - l| + 1 <= s / P,   or
    (b)  |i - j| mod ceil(P / s) == 0  and  k == l,

and everybody sees frame 0 (the sink). So `|k - l|` is bounded by a half-width that depends on the
frames' distance alone: `s // P - 1`, then 0 or nothing. About `4 s n log2(n / s)` pairs are kept at
most. Attention is not causal; text tokens, which see and are seen by all, follow the video.

Two forms: :func:`radial_mask`, the paper's, token by token; :func:`radial_block_mask`
(`regard.patterns.radial_blocks`), the official code's, block by block, which differs: bands of about
twice the width, a power of two above `s` instead of `s`, never thinner than a block, blocks kept by
how full they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.card import Card
from regard.core.grid import Box, GridMask, Point
from regard.core.layout import Index
from regard.core.mask import MaskMod
from regard.patterns.radial_blocks import RadialBlocks as RadialBlocks
from regard.patterns.radial_blocks import keep_by_distance as keep_by_distance
from regard.patterns.radial_blocks import radial_block_map as radial_block_map
from regard.patterns.radial_blocks import radial_block_mask as radial_block_mask
from regard.patterns.radial_blocks import width_by_distance as width_by_distance
from regard.patterns.radial_boxes import between, bounds, power_below

CARD = Card(
    key="radial",
    title="Radial Attention: O(nlog n) Sparse Attention with Energy Decay for Long Video Generation",
    arxiv="2506.19852",
    family="kernel",
    entry="regard.patterns.radial:radial_mask",
    definition="tests/patterns/test_radial.py::test_is_the_definition",
    oracle="python -m tests.golden tests/golden/data/radial.npz",
    claim="python -m benchmarks.radial",
    cost="python -m benchmarks.radial --only growth",
    note="The paper's mask by token, the official code's by block; they differ, see the docstring.",
)


@dataclass(frozen=True)
class Radial(GridMask):
    """The paper's mask; arguments as :func:`radial_mask`."""

    frames: int
    tokens_per_frame: int
    sink: bool = True
    text: int = 0
    grid: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("tokens_per_frame", 1), ("text", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"radial_mask: {name} must be an integer >= {least}, got {value!r}"
                )
        object.__setattr__(self, "grid", (self.frames, self.tokens_per_frame))

    @property
    def text_after(self) -> int:
        return self.text

    def half_width(self, distance: Tensor) -> Tensor:
        """The largest `|k - l|` allowed at a distance of frames, -1 where nothing is."""
        s = self.tokens_per_frame
        power = power_below(distance.clamp(min=1))
        # ceil(P / s) is 1 while P <= s.
        diagonal = distance % ((power + s - 1) // s) == 0
        return s // power - 1 + ((power > s) & diagonal).to(torch.int64)

    def near(self, q: Point, k: Point) -> Tensor:
        distance = (q[0] - k[0]).abs()
        # Looking up a table is quicker than the formula where there are many pairs.
        width = self.half_width(torch.arange(self.frames, device=distance.device))[distance]
        return self._within(q, k, width)

    def _within(self, q: Point, k: Point, width: Tensor) -> Tensor:
        inside = (q[1] - k[1]).abs() <= width
        return inside | (k[0] == 0) if self.sink else inside

    def flex(self, n: int = 0, m: int | None = None) -> MaskMod:
        """As :meth:`Mask.flex`; without the table, which a compiled kernel cannot look up."""
        offset = 0 if m is None else m - n

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            q, k = self.at(q_idx + offset), self.at(kv_idx)
            inside = self._within(q, k, self.half_width((q[0] - k[0]).abs()))
            return inside | self.is_text(q_idx + offset) | self.is_text(kv_idx)

        return mask_mod

    def box(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        """By the band of the nearest and of the farthest pair of frames."""
        table = self.half_width(torch.arange(self.frames, device=q.lo[0].device))
        first = k.lo[0]
        if self.sink:
            first = first.clamp(min=1)
        some, every = between(table, (q.lo, q.hi), ((first, k.lo[1]), k.hi))
        return (some | (k.lo[0] == 0) if self.sink else some), every

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Exact for every rectangle: a stretch of tokens is three boxes of frames and places."""
        s, last = self.tokens_per_frame, self.points - 1
        free = (i1 > last) | (j1 > last)
        if self.sink:
            free = free | (j0 < s)
            j0 = j0.clamp(min=s)
        table = self.half_width(torch.arange(self.frames, device=i0.device))
        queries, keys = (i0, i1.clamp(max=last)), (j0, j1.clamp(max=last))
        some, every = bounds(table, s, queries, keys)
        return some | free, every

    def pairs(self) -> int:
        """Allowed pairs of the whole sequence, in closed form."""
        f, s = self.frames, self.tokens_per_frame
        distance = torch.arange(f)
        width = self.half_width(distance)
        # |k - l| <= w holds for s (2 w + 1) - w (w + 1) pairs of places, none for w = -1.
        band = (s * (2 * width + 1) - width * (width + 1)).clamp(min=0)
        kept = int((band * (f - distance)).sum()) * 2 - f * int(band[0])
        if self.sink:
            kept += int((s * s - band).sum())
        return kept + self.text * (2 * self.points + self.text)

    def density(self, n: int, m: int | None = None) -> float:
        """As :meth:`Mask.density`; in closed form for the whole sequence."""
        m = n if m is None else m
        self.check(n, m)
        return self.pairs() / (n * n) if n == m else super().density(n, m)


def radial_mask(frames: int, tokens_per_frame: int, *, sink: bool = True, text: int = 0) -> Radial:
    """The paper's mask on `frames * tokens_per_frame` video tokens and then `text` text tokens.

    Args:
        frames: `f`, frames of the latent video.
        tokens_per_frame: `s`.
        sink: everybody sees frame 0.
        text: text tokens after the video, which see and are seen by all.

    Returns:
        A mask for sequences of exactly that length (the queries may be its last rows).

    Raises:
        ValueError: a size out of range; and from its use, another number of keys.
    """
    return Radial(frames, tokens_per_frame, sink, text)
