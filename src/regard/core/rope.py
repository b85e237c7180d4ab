"""Rotary position embedding at any positions, one for each row if need be (arXiv 2104.09864).

Scores under it depend on differences of positions only. Attention that puts a block of keys at a new
place therefore need not touch the keys: a query turned to `p + shift` meets keys that stand at their
own positions as a query at `p` would meet the same keys moved by `-shift`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope"]


def rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """`x` turned by `positions * base ** (-2 i / D)` in the plane of the channels `i` and `i + D / 2`.

    Args:
        x: `(..., L, D)` with even `D`, unrotated.
        positions: numbers that broadcast to `(..., L)`; negative ones turn the other way.
        base: of the wavelengths.

    Returns:
        As `x`. Angles are made in float64, so that positions of a million are as exact as small ones.

    Raises:
        ValueError: odd `D`, or positions that do not broadcast.
    """
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f"rope: x has {d} channels, expected an even number")
    try:
        positions = positions.to(x.device).expand(x.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"rope: positions are {tuple(positions.shape)}, expected to fit x's {tuple(x.shape[:-1])}"
        ) from error
    cos, sin = _turns(positions, base, d, x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _turns(positions: Tensor, base: float, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, `(..., L, d / 2)`. Integer positions that come back often are
    looked up in a table of all between the first and the last."""
    first, count = 0, 0
    if positions.numel() and not positions.is_floating_point():
        first = int(positions.min())
        count = int(positions.max()) - first + 1
    table = 0 < count < positions.numel()
    places = torch.arange(first, first + count, device=positions.device) if table else positions
    exponent = torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / d
    angles = places[..., None].double() * base**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if table:
        return cos[positions - first], sin[positions - first]
    return cos, sin
