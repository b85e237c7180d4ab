"""Boxes of frames and places in them, for :class:`regard.patterns.radial.Radial`."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

# First and last (frame, place) of a box, inclusive; no box where the first frame exceeds the last.
Corners: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def power_below(x: Tensor) -> Tensor:
    """The largest power of two that is at most ``x``, for ``x >= 1``."""
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return x - (x >> 1)


def between(table: Tensor, q: Corners, k: Corners, start: int = 0) -> tuple[Tensor, Tensor]:
    """Whether some, and whether all, pairs of two boxes are allowed; an empty box has no pairs.

    Args:
        table: the band's half-width at each distance of frames, -1 for none, int64 ``(f,)``.
        q, k: boxes of queries and of keys.
        start: the first distance with a band; all nearer ones have none.
    """
    (a0, k0), (a1, k1) = q
    (b0, l0), (b1, l1) = k
    real = (a0 <= a1) & (b0 <= b1)
    # Distances of frames and of places: all integers from near to far, independent of each other.
    top = len(table) - 1
    near = torch.maximum(a0 - b1, b0 - a1).clamp(min=0, max=top)
    far = torch.maximum(a1 - b0, b1 - a0).clamp(min=0, max=top)
    least = torch.maximum(k0 - l1, l0 - k1).clamp(min=0)
    most = torch.maximum(k1 - l0, l1 - k0)
    # Bands wider than a diagonal only get thinner with the distance; beyond them there is a
    # diagonal at some of the distances.
    count = torch.nn.functional.pad((table >= 0).long().cumsum(0), (1, 0))
    held = count[far + 1] - count[near]
    widest = near.clamp(min=min(start, top))
    some = torch.where(least > 0, (table[widest] >= least) & (far >= widest), held > 0)
    every = torch.where(most > 0, (table[far] >= most) & (near >= start), held == far - near + 1)
    return real & some, ~real | every


def bounds(
    table: Tensor,
    s: int,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """As :func:`between` for two stretches of video tokens, exactly.

    Args:
        table: as for :func:`between`.
        s: tokens a frame.
        queries, keys: first and last token, inclusive; empty where the first exceeds the last.
        start: as for :func:`between`.
    """
    parts = [between(table, q, k, start) for q in _boxes(*queries, s) for k in _boxes(*keys, s)]
    some, every = parts[0]
    for s1, e1 in parts[1:]:
        some, every = some | s1, every & e1
    return some, every


def _boxes(first: Tensor, last: Tensor, s: int) -> list[Corners]:
    """A stretch of tokens as part of a frame, whole frames, and part of a frame."""
    a, z = first // s, torch.div(last, s, rounding_mode="floor")
    zero, end = torch.zeros_like(a), torch.full_like(a, s - 1)
    head = a + (first > last).long()
    tail = torch.where(z > a, z, z + 1)
    return [
        ((head, first % s), (a, torch.where(z == a, last % s, s - 1))),
        ((a + 1, zero), (z - 1, end)),
        ((tail, zero), (z, last % s)),
    ]
