"""The attention output as a statistic: attention and its statistics in one pass over the scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .stat_tile import Kept, Shape, Tile


@dataclass(eq=False)
class Output(Kept):
    """``softmax(...) v`` of the same pass, `(B, H, N, Dv)`: the scores are computed once for both.

    Attributes:
        v: values `(B, Hkv, M, Dv)`; `Hkv` divides the number of query heads. No gradients flow.
    """

    v: Tensor = field(repr=False)
    name: str = field(default="out", kw_only=True)
    _group: int = field(init=False, repr=False)
    _values: Tensor = field(init=False, repr=False)

    def _room(self, shape: Shape) -> Tensor:
        v = self.v
        fits = v.dim() == 4 and (v.shape[0], v.shape[2]) == (shape.batch, shape.m)
        if not fits or v.shape[1] == 0 or shape.heads % v.shape[1]:
            raise ValueError(
                f"Output: v is {tuple(v.shape)}, expected ({shape.batch}, a divisor of "
                f"{shape.heads}, {shape.m}, width)"
            )
        self._group = shape.heads // v.shape[1]
        self._values = v.to(shape.device, shape.dtype).flatten(0, 1)
        return shape.full(shape.n, v.shape[3])

    def update(self, tile: Tile) -> None:
        start, stop, group = tile.streams.start, tile.streams.stop, self._group
        values = self._values[start // group : (stop - 1) // group + 1][:, tile.keys]
        heads, n, m = tile.p.shape
        # Heads of one group stand side by side: fold them into rows, so that no value is repeated.
        folded = tile.p.view(values.shape[0], heads // values.shape[0] * n, m)
        tile.put(self._sum, torch.bmm(folded, values).view(heads, n, -1))
