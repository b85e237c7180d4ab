"""Named parts of a prompt: system, image, question, generated, ..."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

Range: TypeAlias = tuple[int, int]
GENERATED = "generated"


@dataclass(frozen=True)
class Spans:
    """A partition of absolute key positions into named half-open ranges.

    A position is a column of the model's ``input_ids`` (left padding included); the spans hold for
    every batch entry. Everything from ``length`` on belongs to ``"generated"``. Write them as
    ``Spans.of(system=(0, 12), image=[(12, 40), (44, 72)], text=(72, 90))``.

    Args:
        ranges: name -> ranges, not overlapping.
        length: number of prompt positions. ``None``: the engine fills in the length of the prompt
            that it sees.
    """

    ranges: Mapping[str, tuple[Range, ...]]
    length: int | None = None

    def __post_init__(self) -> None:
        taken: list[tuple[int, int, str]] = []
        for name, ranges in self.ranges.items():
            if name == GENERATED:
                raise ValueError(
                    f"Spans: {GENERATED!r} is everything after the prompt, not a range"
                )
            for start, stop in ranges:
                if not 0 <= start <= stop:
                    raise ValueError(f"Spans: {name} has range ({start}, {stop}), not 0 <= a <= b")
                if self.length is not None and stop > self.length:
                    raise ValueError(f"Spans: {name} ends at {stop}, the prompt at {self.length}")
                if stop > start:
                    taken.append((start, stop, name))
        taken.sort()
        for (_, stop, first), (start, _, second) in pairwise(taken):
            if start < stop:
                raise ValueError(f"Spans: {first} and {second} overlap at position {start}")

    @classmethod
    def of(cls, length: int | None = None, **named: Range | Sequence[Range]) -> Spans:
        """Spans from keywords; a value is one range ``(a, b)`` or a list of them."""
        ranges: dict[str, tuple[Range, ...]] = {}
        for name, value in named.items():
            single = len(value) == 2 and all(isinstance(x, int) for x in value)
            ranges[name] = tuple(_range(name, r) for r in ([value] if single else value))
        return cls(ranges, length)

    @classmethod
    def where(cls, ids: Tensor, **tokens: int) -> Spans:
        """Spans of the runs of special tokens in one sequence of ids ``(N,)``, e.g. ``image=32000``."""
        if ids.dim() != 1:
            raise ValueError(f"Spans.where: ids must be one sequence (N,), got {tuple(ids.shape)}")
        found: dict[str, tuple[Range, ...]] = {}
        for name, token in tokens.items():
            edge = torch.nn.functional.pad((ids == token).to(torch.int8), (1, 1)).diff()
            starts, stops = (edge == 1).nonzero(), (edge == -1).nonzero()
            runs = zip(starts.flatten().tolist(), stops.flatten().tolist(), strict=True)
            found[name] = tuple(runs)
        return cls(found, ids.shape[0])

    def within(self, length: int) -> Spans:
        """The same spans with the prompt's length filled in, where none was given."""
        return self if self.length is not None else replace(self, length=length)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order they were given, ``"generated"`` last."""
        return (*self.ranges, GENERATED)

    def end(self, name: str) -> int:
        """The position after the last range of ``name``."""
        return max((stop for _, stop in self._of(name)), default=0)

    def contains(self, name: str, positions: Tensor) -> Tensor:
        """Which of these positions (any shape, integer) belong to ``name``: bool, same shape."""
        if name == GENERATED:
            return positions >= self._length()
        inside = torch.zeros_like(positions, dtype=torch.bool)
        for start, stop in self._of(name):
            inside |= (positions >= start) & (positions < stop)
        return inside

    def positions(self, name: str, m: int) -> Tensor:
        """The positions of ``name`` among the first ``m``, ascending, int64."""
        every = torch.arange(m)
        return every[self.contains(name, every)]

    def _of(self, name: str) -> Iterable[Range]:
        if name not in self.ranges:
            raise ValueError(f"Spans: no span {name!r}; there are {', '.join(self.names)}")
        return self.ranges[name]

    def _length(self) -> int:
        if self.length is None:
            raise ValueError("Spans: the prompt's length is not known yet; give length=")
        return self.length


def _range(name: str, value: object) -> Range:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"Spans: {name} must be (start, stop) or a list of them, got {value!r}")
    return int(value[0]), int(value[1])
