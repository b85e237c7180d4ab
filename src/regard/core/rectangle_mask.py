"""A mask of rectangles: queries of some ranges of positions and keys of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .layout import Index
from .mask import Mask

Range: TypeAlias = "tuple[int, int]"


@dataclass(frozen=True, repr=False)
class Rectangles(Mask):
    """Queries of certain ranges see the keys of certain ranges; ``~`` of it, that they do not.

    Args:
        queries: ranges ``(start, stop)`` of query positions, ``stop`` excluded; default all positions.
        keys: ranges of key positions, likewise.

    Attributes:
        queries, keys: the same positions as ascending ranges with gaps between them, or ``None``.

    Raises:
        ValueError: no ranges of integers with ``0 <= start <= stop``.
    """

    queries: Sequence[Range] | None = None
    keys: Sequence[Range] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", _joined("queries", self.queries))
        object.__setattr__(self, "keys", _joined("keys", self.keys))

    closed = True
    constant = True

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return (_held(self.queries, i, i) > 0) & (_held(self.keys, j, j) > 0)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        rows, columns = _held(self.queries, i0, i1), _held(self.keys, j0, j1)
        return (rows > 0) & (columns > 0), (rows == i1 - i0 + 1) & (columns == j1 - j0 + 1)

    def __repr__(self) -> str:
        sides = {"queries": self.queries, "keys": self.keys}
        told = [f"{name}={ranges!r}" for name, ranges in sides.items() if ranges is not None]
        return f"Rectangles({', '.join(told)})"


def _joined(name: str, given: object) -> tuple[Range, ...] | None:
    """Ranges in ascending order, those that touch made one, empty ones left out."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or not all(_is_range(one) for one in given):
        raise ValueError(
            f"Rectangles: {name} must be ranges (start, stop) with 0 <= start <= stop, got {given!r}"
        )
    found: list[Range] = []
    for start, stop in sorted((a, z) for a, z in given if a < z):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _is_range(one: object) -> bool:
    if not isinstance(one, (tuple, list)) or [type(x) for x in one] != [int, int]:
        return False
    return bool(0 <= one[0] <= one[1])


def _held(ranges: Sequence[Range] | None, first: Tensor, last: Tensor) -> Tensor:
    """How many positions of ``first`` to ``last`` (inclusive) the ranges hold."""
    if ranges is None:
        return last - first + 1
    held = torch.zeros_like(first)
    for start, stop in ranges:
        held = held + (last.clamp(max=stop - 1) - first.clamp(min=start) + 1).clamp(min=0)
    return held
