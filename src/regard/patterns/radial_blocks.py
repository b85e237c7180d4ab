"""Radial Attention by blocks, as the official code builds it (arXiv 2506.19852).

Followed exactly, with its differences from the paper: see :mod:`regard.patterns.radial`. A frame pair
at distance `d`, with `L = 2^bits(s) / 2^bits(d)` (`bits` is the bit length):

    half-width  max(L decay_factor, block), a whole frame for d <= 1
    kept        L >= 128 or d mod int(128 / L) == 0, whatever block and decay_factor are

A block survives when, among those of its columns that hold any kept pair, more than 60 % are kept in
more than a third of their rows. A frame pair writes `ceil(s / block)` blocks a side; what reaches
beyond them, because frames do not begin at a block, is dropped. Blocks from the one that holds the
end of the video on are text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regard.core.layout import Index
from regard.core.masks import Mask

Variant: TypeAlias = Literal["wan", "hunyuan"]

# The official code's constant in the rule that drops frame pairs, independent of the block.
_THINNEST = 128


def _decayed(s: int, distance: int) -> float:
    return float(2 ** s.bit_length() / 2 ** distance.bit_length())


def width_by_distance(
    frames: int, tokens_per_frame: int, block: int = 128, decay_factor: float = 1.0
) -> Tensor:
    """Half-width of the band in tokens at frame distance 0, 1, ..., float64 ``(frames,)``."""
    s = tokens_per_frame
    wide = (max(_decayed(s, d) * decay_factor, block) if d > 1 else s for d in range(frames))
    return torch.tensor(list(wide), dtype=torch.float64)


def keep_by_distance(frames: int, tokens_per_frame: int) -> Tensor:
    """Whether frame pairs are kept at distance 0, 1, ..., bool ``(frames,)``."""
    kept = []
    for d in range(frames):
        length = _decayed(tokens_per_frame, d)
        kept.append(length >= _THINNEST or d % int(_THINNEST / length) == 0)
    return torch.tensor(kept)


def radial_block_map(
    frames: int,
    tokens_per_frame: int,
    *,
    text: int = 0,
    block: int = 128,
    decay_factor: float = 1.0,
    variant: Variant = "wan",
) -> Tensor:
    """The official code's map of blocks, bool ``(S // block, S // block)``.

    Args:
        frames, tokens_per_frame: of the latent video.
        text: text tokens after it; `S` counts both. Tokens beyond the last whole block are dropped.
        block: tokens a block.
        decay_factor: factor on the half-widths.
        variant: `"wan"` keeps all of frame 0 as keys; `"hunyuan"` relies on the text instead.

    Raises:
        ValueError: sizes out of range, or a last frame that reaches beyond the last whole block.
    """
    sizes = (("frames", frames, 1), ("tokens_per_frame", tokens_per_frame, 1))
    for name, value, least in (*sizes, ("text", text, 0), ("block", block, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"radial_block_map: {name} must be an integer >= {least}, got {value!r}"
            )
    if variant not in ("wan", "hunyuan"):
        raise ValueError(f"radial_block_map: variant must be 'wan' or 'hunyuan', got {variant!r}")
    if not decay_factor > 0:
        raise ValueError(f"radial_block_map: decay_factor must be positive, got {decay_factor}")
    return _map(frames, tokens_per_frame, text, block, decay_factor, variant).clone()


# Built once for each shape, never kept for another one, and never changed.
@lru_cache(maxsize=16)
def _map(f: int, s: int, text: int, block: int, decay_factor: float, variant: str) -> Tensor:
    total, side = (f * s + text) // block, -(-s // block)
    # A frame of one block beyond the end is dropped; a longer one the official code cannot place.
    if side > 1 and (f - 1) * s // block + side > total:
        raise ValueError(
            f"radial_block_map: {f} frames of {s} tokens and {text} of text are {f * s + text}, whose "
            f"{total} whole blocks of {block} do not hold the last frame; add text or padding"
        )
    kept = keep_by_distance(f, s).tolist()
    # Places are whole numbers: a fractional half-width counts as its whole part.
    widths = width_by_distance(f, s, block, decay_factor).floor().long().clamp(max=s).tolist()
    found = torch.zeros(total, total, dtype=torch.bool)
    found[f * s // block :] = True
    found[:, f * s // block :] = True
    parts: dict[tuple[int, int, int], Tensor] = {}
    for i in range(f):
        for j in range(f):
            sink = j == 0 and variant == "wan"
            if not sink and not kept[abs(i - j)]:
                continue
            key = (s if sink else widths[abs(i - j)], i * s % block, j * s % block)
            if key not in parts:
                parts[key] = _blocks(s, block, *key)
            row, column = i * s // block, j * s // block
            found[row : row + side, column : column + side] |= parts[key]
    return found


def _blocks(s: int, block: int, width: int, shift_q: int, shift_k: int) -> Tensor:
    """Blocks of one frame pair that survive, bool (side, side), frames shifted by so many tokens."""
    side = -(-s // block)
    row = torch.arange(side)[:, None] * block - shift_q
    place = torch.arange(side * block) - shift_k
    inside = (place >= 0) & (place < s)
    # Rows of each block that the band holds in each column.
    first = torch.maximum(row, place - width).clamp(min=0)
    last = torch.minimum(row + block - 1, place + width).clamp(max=s - 1)
    rows = ((last - first + 1).clamp(min=0) * inside).view(side, side, block)
    some, many = (rows > 0).sum(-1), (rows * 3 > block).sum(-1)
    # many / some > 0.6 in whole numbers.
    return many * 5 > some * 3


@dataclass(frozen=True)
class RadialBlocks(Mask):
    """The official block map as a mask; arguments as :func:`radial_block_map`."""

    frames: int
    tokens_per_frame: int
    text: int = 0
    block: int = 128
    decay_factor: float = 1.0
    variant: Variant = "wan"
    blocks: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        blocks = radial_block_map(
            self.frames,
            self.tokens_per_frame,
            text=self.text,
            block=self.block,
            decay_factor=self.decay_factor,
            variant=self.variant,
        )
        if self.tokens % self.block:
            raise ValueError(
                f"radial_block_mask: {self.tokens} tokens are no multiple of block={self.block}; "
                "pad the text"
            )
        object.__setattr__(self, "blocks", blocks)
        count = torch.nn.functional.pad(blocks.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
        object.__setattr__(self, "_count", count)

    @property
    def tokens(self) -> int:
        """Length of the sequence, text included."""
        return self.frames * self.tokens_per_frame + self.text

    closed = True

    @property
    def constant(self) -> bool:
        # The tensors follow from the numbers, by which masks are compared.
        return True

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if m != self.tokens or n > m:
            raise ValueError(
                f"radial_block_mask: made for {self.tokens} tokens, but the call has {n} queries and "
                f"{m} keys"
            )

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return self.blocks.to(i.device)[i // self.block, j // self.block]

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Exact, by counting the kept blocks that a rectangle touches."""
        a0, a1 = i0 // self.block, i1 // self.block + 1
        b0, b1 = j0 // self.block, j1 // self.block + 1
        count: Tensor = self._count.to(i0.device)  # type: ignore[attr-defined]
        held = count[a1, b1] - count[a0, b1] - count[a1, b0] + count[a0, b0]
        return held > 0, held == (a1 - a0) * (b1 - b0)


def radial_block_mask(
    frames: int,
    tokens_per_frame: int,
    *,
    text: int = 0,
    block: int = 128,
    decay_factor: float = 1.0,
    variant: Variant = "wan",
) -> RadialBlocks:
    """The official code's pattern as a mask, for sequences that are a multiple of the block long.

    The authors run the first denoising steps and layers dense (12 steps and 1 layer are recommended
    for videos of the model's own length, 2 layers and 2 steps at twice that).

    Args:
        frames, tokens_per_frame, text, block, decay_factor, variant: as :func:`radial_block_map`.

    Raises:
        ValueError: sizes out of range or not a multiple of `block`.
    """
    return RadialBlocks(frames, tokens_per_frame, text, block, decay_factor, variant)
