"""The whole weight matrix at a coarser grain, pooled while its tiles pass by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .stat_tile import Kept, Shape, Tile


@dataclass(eq=False)
class Pooled(Kept):
    """Mass between bins of positions, `(B, H, rows, cols)`: a picture of the matrix in `O(1)` size.

    Entry `[r, c]` is the mass that the queries of bin `r` have on the keys of bin `c`, divided by the
    number of these queries. With `width` 1 it is the matrix itself.

    Attributes:
        width: positions a bin; position `p` belongs to bin `p // width`.
        rows, cols: half-open ranges of positions `(start, stop)` to be binned, bins counted from
            their start; default all `M`. Queries that the call does not hold have zeros. Of more
            queries than keys the first ones stand at positions below 0.
    """

    width: int
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None
    name: str = field(default="pooled", kw_only=True)
    _ranges: tuple[tuple[int, int], tuple[int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"Pooled: width must be >= 1, got {self.width}")
        for name, span in (("rows", self.rows), ("cols", self.cols)):
            if span is not None and not span[0] < span[1]:
                raise ValueError(f"Pooled: {name} must be (start, stop), start < stop, got {span}")
        if self.cols is not None and self.cols[0] < 0:
            raise ValueError(f"Pooled: cols must start at 0 or later, got {self.cols}")

    def _room(self, shape: Shape) -> Tensor:
        self._ranges = self.rows or (0, shape.m), self.cols or (0, shape.m)
        high, wide = (-(-(stop - start) // self.width) for start, stop in self._ranges)
        return shape.full(high, wide)

    def update(self, tile: Tile) -> None:
        (top, bottom), (left, right) = self._ranges
        r = ((tile.i >= top) & (tile.i < bottom)).nonzero()[:, 0]
        c = ((tile.j >= left) & (tile.j < right)).nonzero()[:, 0]
        if not (r.numel() and c.numel()):
            return
        bins, at = torch.unique((tile.i[r] - top) // self.width, return_inverse=True)
        # Rows are summed as a product with few rows, then columns where they belong.
        pick = tile.p.new_zeros(bins.numel(), tile.p.shape[1])
        pick[at, r] = 1.0
        sums = torch.matmul(pick, tile.p)[..., c]
        columns = (tile.j[c] - left) // self.width
        part = self._sum[tile.streams]
        for b, row in zip(bins.tolist(), sums.unbind(1), strict=True):
            part[:, b].index_add_(1, columns, row)

    def finish(self) -> dict[str, Tensor]:
        shape, (top, bottom) = self._shape, self._ranges[0]
        held = torch.arange(shape.m - shape.n, shape.m, device=shape.device)
        held = held[(held >= top) & (held < bottom)]
        count = torch.bincount((held - top) // self.width, minlength=self._sum.shape[1])
        mean = self._sum / count.clamp(min=1).to(self._sum.dtype)[:, None]
        return {self.name: shape.split(mean)}

    def join(self, parts: Sequence[dict[str, Tensor]], rows: Sequence[int]) -> dict[str, Tensor]:
        if any(n % self.width for n in rows[:-1]):
            raise ValueError(
                f"Pooled: passes of {list(rows)} queries cut bins of {self.width}; read the prompt in "
                "multiples of it"
            )
        wide = max(part[self.name].shape[-1] for part in parts)
        high = max(part[self.name].shape[-2] for part in parts)
        total = parts[0][self.name].new_zeros(*parts[0][self.name].shape[:2], high, wide)
        for part in parts:
            x = part[self.name]
            total[:, :, : x.shape[-2], : x.shape[-1]] += x
        return {self.name: total}
