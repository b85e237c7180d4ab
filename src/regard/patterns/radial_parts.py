"""Radial attention in two parts: near frames frame by frame, far frames place by place.

Far frames see little more than the same place, so that blocks of a frame's tokens hold mostly pairs
that are not allowed. With the frames of a place beside each other the same pairs fill their blocks.
The parts are a partition of the pairs and are merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.attend import attend
from ..core.grid import Box, Point
from ..core.layout import Index
from ..core.merge import merge
from .radial import Radial
from .radial_boxes import between, bounds

# Distance of frames at which the parts meet: of 4, 8, 16, 32 the one that lists the fewest pairs.
_SPLIT = 8


@dataclass(frozen=True)
class RadialPart(Radial):
    """The pairs of :class:`~regard.patterns.radial.Radial` whose frames are ``nearest`` to
    ``farthest`` apart. Those with the sink belong to the part that begins at 0."""

    nearest: int = 0
    farthest: int = 0

    @property
    def _with_sink(self) -> bool:
        return self.sink and self.nearest == 0

    def half_width(self, distance: Tensor) -> Tensor:
        """As for the whole, -1 outside of the part."""
        inside = (distance >= self.nearest) & (distance <= self.farthest)
        return torch.where(inside, super().half_width(distance), -1)

    def _within(self, q: Point, k: Point, width: Tensor) -> Tensor:
        inside = (q[1] - k[1]).abs() <= width
        if not self.sink:
            return inside
        return inside | (k[0] == 0) if self.nearest == 0 else inside & (k[0] > 0)

    def box(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        """As for the whole."""
        table = self.half_width(torch.arange(self.frames, device=q.lo[0].device))
        first = k.lo[0].clamp(min=1) if self.sink else k.lo[0]
        some, every = between(table, (q.lo, q.hi), ((first, k.lo[1]), k.hi), self.nearest)
        at_sink = k.lo[0] == 0
        if self._with_sink:
            return some | at_sink, every
        return some, every & ~at_sink if self.sink else every

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """As for the whole."""
        s, last = self.tokens_per_frame, self.points - 1
        free = (i1 > last) | (j1 > last)
        at_sink = (j0 < s) if self.sink else torch.zeros_like(j0, dtype=torch.bool)
        table = self.half_width(torch.arange(self.frames, device=i0.device))
        keys = (j0.clamp(min=s) if self.sink else j0, j1.clamp(max=last))
        some, every = bounds(table, s, (i0, i1.clamp(max=last)), keys, self.nearest)
        if self._with_sink:
            return some | free | at_sink, every
        return some | free, every & ~at_sink

    def pairs(self) -> int:
        """Allowed pairs of the whole sequence, in closed form."""
        f, s = self.frames, self.tokens_per_frame
        distance = torch.arange(f)
        width = self.half_width(distance)
        band = (s * (2 * width + 1) - width * (width + 1)).clamp(min=0)
        kept = int((band * (f - distance)).sum()) * 2 - f * int(band[0])
        if self.sink:
            kept += int((s * s - band).sum()) if self.nearest == 0 else -int(band.sum())
        return kept + self.text * (2 * self.points + self.text)


def radial_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Radial, *, scale: float | None = None
) -> Tensor:
    """``attend(q, k, v, mask=mask)`` with fewer listed pairs where the video has many frames.

    Args:
        q: ``(B, H, N, D)``, the whole sequence: video, then text.
        k, v: ``(B, Hkv, N, D)`` and ``(B, Hkv, N, Dv)``.
        mask: from :func:`~regard.patterns.radial.radial_mask`.
        scale: factor on the scores, default ``D ** -0.5``.

    Raises:
        ValueError: ``q`` is not the whole sequence, or shapes do not fit.
    """
    if type(mask) is not Radial:
        raise ValueError(f"radial_attention: mask must be from radial_mask, got {mask!r}")
    mask.check(q.shape[2], k.shape[2])
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"radial_attention: q has {q.shape[2]} tokens, expected the whole sequence of {k.shape[2]}"
        )
    if mask.frames < 4 * _SPLIT:
        whole: Tensor = attend(q, k, v, mask=mask, scale=scale)
        return whole
    frames, s = mask.frames, mask.tokens_per_frame
    near = RadialPart(frames, s, mask.sink, mask.text, 0, _SPLIT - 1)
    far = RadialPart(frames, s, mask.sink, 0, _SPLIT, frames - 1)
    out, lse = attend(q, k, v, mask=near, scale=scale, return_lse=True)
    video = slice(mask.points)
    parts = (x[:, :, video] for x in (q, k, v))
    out_far, lse_far = attend(*parts, mask=far, scale=scale, return_lse=True)
    joined, _ = merge([(out[:, :, video], lse[:, :, video]), (out_far, lse_far)])
    return torch.cat([joined, out[:, :, mask.points :]], dim=2)
