"""Static patterns: masks that say where a query may look, by position alone.

Masks combine with ``&``, ``|`` and ``~``; their ``repr`` can be pasted back.

    >>> Causal() & (SlidingWindow(256) | Sinks(4))
    Causal() & (SlidingWindow(left=256, right=0) | Sinks(n=4))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Index as Index
from .mask import And as And
from .mask import Mask as Mask
from .mask import Not as Not
from .mask import Or as Or
from .mask import Predicate as Predicate
from .mask import Shifted as Shifted


def _at_least(name: str, field: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {field} must be an integer >= {least}, got {value!r}")


class _Band(Mask):
    """Masks that depend on the distance ``i - j`` alone."""

    closed = True
    relative = True
    constant = True


@dataclass(frozen=True)
class Full(_Band):
    """Every query sees every key."""

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return torch.ones_like(i - j, dtype=torch.bool)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        some = torch.ones_like(i0 + j0, dtype=torch.bool)
        return some, some


@dataclass(frozen=True)
class Causal(_Band):
    """A query sees keys at its own position and before: ``j <= i``."""

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return j <= i

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        return j0 <= i1, j1 <= i0


@dataclass(frozen=True)
class SlidingWindow(_Band):
    """``i - left <= j <= i + right``: both ends included, so ``left + 1`` keys for ``right = 0``.

    This is flash-attn's convention; transformers' ``sliding_window=W`` is ``SlidingWindow(W - 1)``.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        _at_least("SlidingWindow", "left", self.left, 0)
        _at_least("SlidingWindow", "right", self.right, 0)

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        d = i - j
        return (d <= self.left) & (d >= -self.right)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        low, high = i0 - j1, i1 - j0
        some = (low <= self.left) & (high >= -self.right)
        return some, (low >= -self.right) & (high <= self.left)


@dataclass(frozen=True)
class Dilated(_Band):
    """Every ``dilation``-th key: ``j = i - t * dilation`` with ``-right <= t <= window``."""

    window: int
    dilation: int
    right: int = 0

    def __post_init__(self) -> None:
        _at_least("Dilated", "window", self.window, 0)
        _at_least("Dilated", "dilation", self.dilation, 1)
        _at_least("Dilated", "right", self.right, 0)

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        d = i - j
        inside = (d <= self.window * self.dilation) & (d >= -self.right * self.dilation)
        return inside & (d % self.dilation == 0)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        low = (i0 - j1).clamp(min=-self.right * self.dilation)
        high = (i1 - j0).clamp(max=self.window * self.dilation)
        return _multiples(low, high, i1 - j0, i0 - j1, self.dilation)


@dataclass(frozen=True)
class Strided(_Band):
    """Every ``stride``-th key in both directions, ``(i - j) % stride == 0``.

    Sparse Transformer's strided head (arXiv 1904.10509, section 4.3); combine it with
    ``Causal()`` and a ``SlidingWindow(stride)`` for the paper's full pattern.
    """

    stride: int

    def __post_init__(self) -> None:
        _at_least("Strided", "stride", self.stride, 1)

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return (i - j) % self.stride == 0

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        return _multiples(i0 - j1, i1 - j0, i1 - j0, i0 - j1, self.stride)


def _multiples(
    low: Tensor, high: Tensor, d_max: Tensor, d_min: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Bounds for "distance is a multiple of step inside [low, high]" on distances d_min..d_max."""
    some = (low <= high) & (torch.div(high, step, rounding_mode="floor") * step >= low)
    whole = (low == d_min) & (high == d_max)
    return some, some & whole & ((d_max == d_min) | (step == 1))


@dataclass(frozen=True)
class Sinks(Mask):
    """The first ``n`` keys of the sequence: ``j < n`` (StreamingLLM, arXiv 2309.17453)."""

    n: int

    def __post_init__(self) -> None:
        _at_least("Sinks", "n", self.n, 0)

    closed = True
    constant = True

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return j < self.n

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        shape = i0 + j0
        return (j0 < self.n).expand_as(shape), (j1 < self.n).expand_as(shape)


@dataclass(frozen=True)
class Prefix(Mask):
    """The first ``n`` positions see each other: ``i < n and j < n``; ``Causal() | Prefix(n)`` is
    a prefix language model."""

    n: int

    def __post_init__(self) -> None:
        _at_least("Prefix", "n", self.n, 0)

    closed = True
    constant = True

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return (i < self.n) & (j < self.n)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        return (i0 < self.n) & (j0 < self.n), (i1 < self.n) & (j1 < self.n)
