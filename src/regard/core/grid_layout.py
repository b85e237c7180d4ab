"""Layouts of masks on grids: which order of the tokens makes dense blocks, and what the blocks see.

Consecutive slots must be near each other on the grid, wherever a block happens to begin. So the grid
is cut into strips of some thickness on every axis but the last, and a path runs along the last axis
through one strip after the other, there and back: any stretch of the path is compact, also where it
turns from one strip into the next, whatever the extents. Where the extents are multiples, stretches
are the tiles of multi-dimensional tiling (arXiv 2403.04690, section 3; arXiv 2504.16922, section 3).
Residue classes of a dilation come one after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .grid import Blocks, Box, GridMask
from .layout import BlockLayout, pack_lists

# (query block, key block) pairs whose bounds are evaluated at once.
_PAIRS = 1 << 20
# By how much a permutation must shorten the lists: gathering its rows costs something, too (measured).
_WORTH = 1.15
# Query blocks that a candidate order is judged by.
_SAMPLE = 24


def path(mask: GridMask, thickness: tuple[int, ...]) -> Tensor:
    """Grid points in the order of a path through strips.

    Args:
        mask: its ``grid`` and ``steps`` count.
        thickness: of the strips, for every axis but the last.

    Returns:
        int64 ``(points,)``: row-major index of each point on the path.
    """
    index = torch.arange(mask.points)
    at = mask.at(index + mask.text_before)
    rank = torch.zeros_like(index)
    for x, step in zip(at, mask.steps, strict=True):
        rank = rank * step + x % step
    places = [torch.div(x, s, rounding_mode="floor") for x, s in zip(at, mask.steps, strict=True)]
    extents = [-(-extent // s) for extent, s in zip(mask.grid, mask.steps, strict=True)]
    strip, inside = torch.zeros_like(index), torch.zeros_like(index)
    for x, extent, thick in zip(places[:-1], extents[:-1], thickness, strict=True):
        count = -(-extent // thick)
        which = torch.div(x, thick, rounding_mode="floor")
        # Every other strip is walked backwards.
        strip = strip * count + torch.where(strip % 2 == 0, which, count - 1 - which)
        rank = rank * count + strip % count
        inside = inside * thick + x % thick
    along = torch.where(strip % 2 == 0, places[-1], extents[-1] - 1 - places[-1])
    rank = (rank * extents[-1] + along) * math.prod(thickness) + inside
    return torch.argsort(rank)


def thicknesses(mask: GridMask, block: int) -> list[tuple[int, ...]]:
    """Thicknesses worth trying for blocks of so many tokens, the most cubic one first."""
    extents = [-(-extent // step) for extent, step in zip(mask.grid, mask.steps, strict=True)]
    axes = []
    for extent in extents[:-1]:
        powers = {1 << p for p in range(block.bit_length()) if 1 << p < extent}
        axes.append(sorted(powers | ({extent} if extent <= block else set())))
    found = [t for t in itertools.product(*axes) if math.prod(t) <= block]

    def oblong(t: tuple[int, ...]) -> float:
        sides = [*t, min(block / math.prod(t), extents[-1])]
        return max(sides) / min(sides)

    return sorted(found, key=oblong)


def measure(mask: GridMask, position: Tensor, block: int) -> Blocks:
    """What each stretch of ``block`` slots holds.

    Args:
        position: position in the sequence of every slot, ``(length,)``.
    """
    length = len(position)
    count = -(-length // block)
    # A short last block repeats its last token.
    slot = torch.arange(count * block).clamp(max=length - 1)
    position = position[slot].view(count, block)
    text = mask.is_text(position)
    lo: list[Tensor] = []
    hi: list[Tensor] = []
    first: list[Tensor] = []
    last: list[Tensor] = []
    for x, step, extent in zip(mask.at(position), mask.steps, mask.grid, strict=True):
        place = torch.div(x, step, rounding_mode="floor")
        for value, low, high in ((place, lo, hi), (x % step, first, last)):
            low.append(value.masked_fill(text, extent).amin(1))
            high.append(value.masked_fill(text, -1).amax(1))
    box = Box(tuple(lo), tuple(hi), tuple(first), tuple(last))
    return Blocks(box, ~text.all(1), text.any(1))


class _Order:
    """Candidate orders of one side (queries or keys), each made once."""

    def __init__(self, mask: GridMask, length: int, block: int) -> None:
        self.mask, self.length, self.block = mask, length, block
        self.tried: dict[tuple[int, ...] | None, tuple[Tensor, Blocks]] = {}
        self.choices = thicknesses(mask, block)

    def get(self, choice: tuple[int, ...] | None) -> tuple[Tensor, Blocks]:
        """Position of every slot, and the blocks; ``None`` is the order of the sequence."""
        if choice not in self.tried:
            mask = self.mask
            position = torch.arange(mask.tokens)
            if choice is not None:
                text = position[mask.is_text(position)]
                position = torch.cat([path(mask, choice) + mask.text_before, text])
            position = position[position >= mask.tokens - self.length]
            self.tried[choice] = position, measure(mask, position, self.block)
        return self.tried[choice]


def _listed(mask: GridMask, q: Blocks, k: Blocks) -> int:
    """Listed pairs of blocks among a sample of the query blocks."""
    count = len(q.grid)
    rows = torch.arange(min(count, _SAMPLE)) * count // min(count, _SAMPLE)
    some, _ = mask.related(q.along(1, rows), k.along(0))
    return int(some.sum())


def choose(
    mask: GridMask, q: _Order, k: _Order
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Thicknesses for queries and keys that list the fewest blocks; ``None`` for the plain order."""
    best_q, best_k = q.choices[0], k.choices[0]
    for _ in range(2):
        keys = k.get(best_k)[1]
        best_q = min(q.choices, key=lambda t: _listed(mask, q.get(t)[1], keys))
        queries = q.get(best_q)[1]
        best_k = min(k.choices, key=lambda t: _listed(mask, queries, k.get(t)[1]))
    tiled = _listed(mask, q.get(best_q)[1], k.get(best_k)[1])
    plain = _listed(mask, q.get(None)[1], k.get(None)[1])
    return (best_q, best_k) if plain > _WORTH * tiled else (None, None)


@lru_cache(maxsize=64)
def _made(
    mask: GridMask, n: int, m: int, block: tuple[int, int], device: Any = None
) -> BlockLayout:
    bq, bk = block
    if bq < 1 or bk < 1:
        raise ValueError(f"{type(mask).__name__}: block sides must be >= 1, got {(bq, bk)}")
    side_q, side_k = _Order(mask, n, bq), _Order(mask, m, bk)
    choice_q, choice_k = choose(mask, side_q, side_k) if n else (None, None)
    at_q, q = side_q.get(choice_q)
    at_k, k = side_k.get(choice_k)
    nq, nk = -(-n // bq), -(-m // bk)
    empty = torch.zeros(0, dtype=torch.int64)
    lines, keys, flags = [empty], [empty], [empty]
    keys_of = k.along(0)
    strip = max(1, _PAIRS // max(1, nk))
    for start in range(0, nq, strip):
        some, every = mask.related(q.along(1, slice(start, start + strip)), keys_of)
        some, every = (x.expand(min(strip, nq - start), nk) for x in (some, every))
        row, key = some.nonzero().unbind(-1)
        lines.append(row + start)
        keys.append(key)
        flags.append((~every[row, key]).long())
    line = torch.cat(lines)
    index, width = pack_lists(line, torch.cat(keys), nq)
    partial, _ = pack_lists(line, torch.cat(flags), nq)
    shape = (1, 1, nq, width)
    return BlockLayout(
        n,
        m,
        bq,
        bk,
        index.view(shape).to(device),
        (partial.view(shape) == 1).to(device),
        mask,
        None if choice_q is None else (at_q - (m - n)).view(1, 1, n).to(device),
        None if choice_k is None else at_k.view(1, 1, m).to(device),
    )


def _layout(
    mask: GridMask, n: int, m: int, block: int | tuple[int, int], device: Any = None
) -> BlockLayout:
    """The layout of a mask on a grid: see :meth:`GridMask.layout`. Made once for equal calls."""
    return _made(mask, n, m, (block, block) if isinstance(block, int) else block, device)


# Compiled code would trace the search and, as it skips Python's caches, repeat it in every call.
grid_layout: Callable[..., BlockLayout] = torch.compiler.disable(_layout)
