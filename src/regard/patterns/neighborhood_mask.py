"""The pattern of neighbourhood attention in one, two and three dimensions.

Hassani et al.: Neighborhood Attention Transformer (arXiv 2204.07143, section 3.2), dilation (arXiv
2209.15001, section 3.1), causal axes (arXiv 2403.04690, section 3), strides (arXiv 2504.16922,
section 3.1). The rule works axis by axis, so a window is a box. On an axis of length `L` a position
`i` has the residue class `g = i mod δ` of `Lg` positions, and the place `p = i // δ` in it. Its keys
are the places `lo <= t < hi` of its class:

    not causal   lead = min((p // s) s + s // 2, Lg - 1)   lo = clamp(lead - w // 2, 0, Lg - w)
                 hi = lo + w
    causal       lead = min((p // s) s + s - 1, Lg - 1)    lo = max(lead - w + 1, 0)
                 hi = p + 1

At a border the window moves inwards: keys are never padded, and a row that is not causal always has
`w` keys. An even window reaches one further to the left. This is NATTEN's definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from regard.core.grid import Box, GridMask, Point

Axes = int | tuple[int, ...]
Flags = bool | tuple[bool, ...]
T = TypeVar("T", int, bool)


def per_axis(name: str, value: T | Sequence[T], axes: int) -> tuple[T, ...]:
    """One value for each axis; a single one counts for all.

    Raises:
        ValueError: another number of values than of axes, or values of another type.
    """
    kind: type = bool if name == "causal" else int
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes or any(type(x) is not kind for x in values):
        raise ValueError(
            f"Neighborhood: {name} must be {kind.__name__} or a tuple of {axes}, got {value!r}"
        )
    return values


def interval(
    place: Tensor, length: Tensor | int, window: int, stride: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Keys `[lo, hi)` of places in a residue class of some length: the rule of one axis."""
    group = torch.div(place, stride, rounding_mode="floor") * stride
    end = torch.as_tensor(length, device=place.device)
    if causal:
        lead = torch.minimum(group + stride - 1, end - 1)
        return (lead - window + 1).clamp(min=0), place + 1
    lead = torch.minimum(group + stride // 2, end - 1)
    lo = torch.minimum((lead - window // 2).clamp(min=0), end - window)
    return lo, lo + window


@dataclass(frozen=True)
class Neighborhood(GridMask):
    """Every point of a grid sees the window around it; single values count for all axes.

    Attributes:
        grid: extents, one to three; tokens are the grid row by row.
        window: `w`, keys on each axis.
        stride: `s`, so many neighbouring queries share the window of one of them; at most `w`.
        dilation: `δ`, a query sees its own residue class; `w δ` must fit into the extent.
        causal: whether an axis has no later keys. Windows of causal axes are cut, not moved.
    """

    grid: tuple[int, ...]
    window: Axes
    stride: Axes = 1
    dilation: Axes = 1
    causal: Flags = False

    def __post_init__(self) -> None:
        grid = tuple(self.grid)
        if not 1 <= len(grid) <= 3 or any(type(x) is not int or x < 1 for x in grid):
            raise ValueError(f"Neighborhood: grid must be one to three extents >= 1, got {grid}")
        object.__setattr__(self, "grid", grid)
        for name in ("window", "stride", "dilation", "causal"):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), len(grid)))
        for axis, (extent, w, s, d, _) in enumerate(self.rules):
            if w < 1 or not 1 <= s <= w or d < 1:
                raise ValueError(
                    f"Neighborhood: axis {axis} has window {w}, stride {s} and dilation {d}, "
                    "expected 1 <= stride <= window and dilation >= 1"
                )
            if w * d > extent:
                raise ValueError(
                    f"Neighborhood: window {w} times dilation {d} is larger than the {extent} "
                    f"positions of axis {axis}"
                )

    @property
    def rules(self) -> tuple[tuple[int, int, int, int, bool], ...]:
        """Extent, window, stride, dilation and causality of every axis."""
        axes = len(self.grid)
        window, stride, dilation = (
            per_axis(name, getattr(self, name), axes) for name in ("window", "stride", "dilation")
        )
        causal = per_axis("causal", self.causal, axes)
        return tuple(zip(self.grid, window, stride, dilation, causal, strict=True))

    @property
    def steps(self) -> tuple[int, ...]:
        return per_axis("dilation", self.dilation, len(self.grid))

    @property
    def keys(self) -> int:
        """Keys of a query away from causal borders, `Π w`."""
        return math.prod(per_axis("window", self.window, len(self.grid)))

    @property
    def full(self) -> bool:
        """Whether every point sees the whole grid."""
        return all(w == extent and not causal for extent, w, _, _, causal in self.rules)

    def windows(self, axis: int, residue: int) -> tuple[Tensor, Tensor]:
        extent, w, s, d, causal = self.rules[axis]
        length = len(range(residue, extent, d))
        return interval(torch.arange(length), length, w, s, causal)

    def near(self, q: Point, k: Point) -> Tensor:
        found = None
        for x, y, (extent, w, s, d, causal) in zip(q, k, self.rules, strict=True):
            g, p = x % d, torch.div(x, d, rounding_mode="floor")
            lo, hi = interval(p, _class_length(extent, g, d), w, s, causal)
            t = torch.div(y, d, rounding_mode="floor")
            one = (t >= lo) & (t < hi)
            if d > 1:
                one = one & (y % d == g)
            found = one if found is None else found & one
        assert found is not None
        return found

    def box(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        some = every = None
        for axis, (extent, w, s, d, causal) in enumerate(self.rules):
            # lo and hi grow with the place and with the length of its class.
            longest = _class_length(extent, q.first[axis], d)
            shortest = _class_length(extent, q.last[axis], d)
            least, inner_hi = interval(q.lo[axis], shortest, w, s, causal)
            inner_lo, most = interval(q.hi[axis], longest, w, s, causal)
            meets = (k.hi[axis] >= least) & (k.lo[axis] < most)
            holds = (k.lo[axis] >= inner_lo) & (k.hi[axis] < inner_hi)
            some = meets if some is None else some & meets
            every = holds if every is None else every & holds
        assert some is not None and every is not None
        return some, every


def _class_length(extent: int, residue: Tensor, dilation: int) -> Tensor:
    """`Lg`, the number of positions of a residue class."""
    return torch.div(extent - residue + dilation - 1, dilation, rounding_mode="floor")
