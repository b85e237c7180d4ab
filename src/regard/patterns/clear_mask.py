"""The pattern of CLEAR as a mask: see :mod:`regard.patterns.clear`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core.grid import Box, GridMask, Point


@dataclass(frozen=True)
class Clear(GridMask):
    """Text tokens see and are seen by all; image tokens see those less than `radius` away.

    Eq. 4 of arXiv 2412.16112. The circle's boundary is excluded, and windows at borders are not
    shifted: they hold fewer keys.

    Attributes:
        height, width: the image in tokens, row by row after the text.
        radius: `r > 0`, in tokens.
        text: text tokens before the image.
    """

    height: int
    width: int
    radius: float
    text: int = 0
    grid: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.text < 0:
            raise ValueError(
                f"Clear: expected height >= 1, width >= 1 and text >= 0, got "
                f"{self.height}, {self.width} and {self.text}"
            )
        if not 0 < self.radius < math.inf:
            raise ValueError(f"Clear: radius must be positive and finite, got {self.radius}")
        object.__setattr__(self, "grid", (self.height, self.width))

    @property
    def text_before(self) -> int:
        return self.text

    @property
    def _limit(self) -> int:
        """Squared distances are integers: those below this are below `r^2`."""
        return math.ceil(self.radius**2)

    def near(self, q: Point, k: Point) -> Tensor:
        return (q[0] - k[0]).square() + (q[1] - k[1]).square() < self._limit

    def box(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        """By the nearest and the farthest corners of the two boxes."""
        nearest = farthest = torch.zeros((), dtype=torch.int64)
        for q0, q1, k0, k1 in zip(q.lo, q.hi, k.lo, k.hi, strict=True):
            ahead, behind = q0 - k1, k0 - q1
            nearest = nearest + torch.maximum(ahead, behind).clamp(min=0).square()
            farthest = farthest + torch.minimum(ahead, behind).square()
        return nearest < self._limit, farthest < self._limit

    @property
    def circle(self) -> int:
        """Grid points in a whole circle, about `π r^2`: 193, 793 and 3205 for `r` = 8, 16, 32."""
        reach = math.isqrt(self._limit - 1)
        return sum(2 * math.isqrt(self._limit - 1 - dy * dy) + 1 for dy in range(-reach, reach + 1))

    def pairs(self) -> int:
        """Allowed pairs of the whole sequence, in closed form."""
        reach, inside = math.isqrt(self._limit - 1), 0
        for dy in range(min(reach, self.height - 1) + 1):
            wide = min(math.isqrt(self._limit - 1 - dy * dy), self.width - 1)
            # Σ (width - |dx|) over the row, and dy below as well as above.
            row = self.width * (2 * wide + 1) - wide * (wide + 1)
            inside += (self.height - dy) * row * (1 if dy == 0 else 2)
        return inside + self.text * (self.text + 2 * self.points)
