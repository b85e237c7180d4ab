"""Additive score terms: what is added to `scale * q k^T` before the softmax.

A bias is defined by one function of absolute positions, `scores(i, j, h, b)`, like a mask. Biases
of low rank also give exact factors (FlashBias, arXiv 2505.12044), which attention carries as extra
channels of `q` and `k`, so that every fast backend serves them and no `N x M` tensor is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bias_base import Bias, Index, axis_width, joint_shape, per_plane, per_plane_index, stretch
from .bias_closed import ALiBi, LowRankBias, RelativeBias1D, RelativeBias2D

__all__ = [
    "ALiBi",
    "Bias",
    "DenseBias",
    "LowRankBias",
    "RelativeBias1D",
    "RelativeBias2D",
    "as_bias",
]


def as_bias(bias: Bias | Tensor) -> Bias:
    """A :class:`Bias` as it is, a float tensor as :class:`DenseBias`; ValueError for the rest."""
    if isinstance(bias, Bias):
        return bias
    if isinstance(bias, Tensor):
        return DenseBias(bias)
    raise ValueError(f"bias: expected a Bias or a float tensor, got {type(bias).__name__}")


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """A bias given entry by entry. It is not factored: see `patterns.flashbias.svd_factors`.

    Attributes:
        tensor: float `(R, M)`, `(H, R, M)` or `(B, H, R, M)`, `B` and `H` may be 1. Row `r` is
            query position `r + M - R`, so a table for all `M` positions serves decoding too.
            Entries may be `-inf`.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        t = self.tensor
        if t.dtype == torch.bool:
            raise ValueError(
                "bias: got a bool tensor, expected a float one; a bool tensor says where a query "
                "may look, so pass it as mask=Dense(tensor)"
            )
        if not t.is_floating_point():
            raise ValueError(f"bias: got a tensor of {t.dtype}, expected a float one")
        if not 2 <= t.dim() <= 4:
            raise ValueError(
                f"bias: got shape {tuple(t.shape)}, expected (N, M), (H, N, M) or (B, H, N, M)"
            )

    @property
    def heads(self) -> int | None:
        return axis_width(self.tensor, 3)

    @property
    def batch(self) -> int | None:
        return axis_width(self.tensor, 4)

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        rows, cols = self.tensor.shape[-2:]
        if cols != m or rows < n:
            raise ValueError(
                f"bias: got {rows} rows and {cols} columns for {n} queries and {m} keys, expected "
                f"at least {n} rows and {m} columns"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def scores(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        table, (h, b) = self._planes(self.tensor, h, b)
        row, j = self._entries(i, j)
        rows, cols = stretch(row, -2), stretch(j, -1)
        shape = joint_shape(i, j, h, b)
        if rows is None or cols is None or not (per_plane(h) and per_plane(b)):
            return table[b, h, row, j].expand(shape)
        return table[:, :, rows, cols][per_plane_index(b), per_plane_index(h)].expand(shape)

    def accumulate(
        self,
        buffers: tuple[Tensor | None, ...],
        grad: Tensor,
        i: Tensor,
        j: Tensor,
        h: Index = 0,
        b: Index = 0,
    ) -> None:
        if buffers[0] is None:
            return
        table, (h, b) = self._planes(buffers[0], h, b)
        grad = grad.to(table.dtype)
        row, j = self._entries(i, j)
        rows, cols = stretch(row, -2), stretch(j, -1)
        if rows is None or cols is None or not (per_plane(h) and per_plane(b)):
            every = (torch.as_tensor(x, device=i.device).expand(grad.shape) for x in (b, h, row, j))
            table.index_put_(tuple(every), grad, accumulate=True)
            return
        part = table[:, :, rows, cols]
        if isinstance(h, int) and isinstance(b, int):
            part[b, h] += grad.sum_to_size(part.shape[-2:])
        else:
            lead = grad.shape[:-2]
            at = (torch.as_tensor(per_plane_index(b)), torch.as_tensor(per_plane_index(h)))
            part.index_put_(
                tuple(x.to(grad.device).expand(lead) for x in at), grad, accumulate=True
            )

    def _entries(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of positions. A kernel's padding may lie outside: it reads anything."""
        rows, cols = self.tensor.shape[-2:]
        return (i + rows - cols).clamp(0, rows - 1), j.clamp(0, cols - 1)

    def _planes(self, table: Tensor, h: Index, b: Index) -> tuple[Tensor, tuple[Index, Index]]:
        """`table` as `(B, H, R, M)`, and the indices with 0 along axes that are shared."""
        table = table[(None,) * (4 - table.dim())]
        return table, (0 if table.shape[1] == 1 else h, 0 if table.shape[0] == 1 else b)
