"""The relative position bias of neighbourhood attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.bias import Bias
from regard.core.bias_base import joint_shape, per_plane, per_plane_index
from regard.core.layout import Index

from .neighborhood_mask import Neighborhood, per_axis


@dataclass(frozen=True, eq=False)
class NeighborhoodBias(Bias):
    """A learned value for each head and offset (NAT, arXiv 2204.07143, eq. 2).

    Offsets count steps of the dilation: `t - p` of the key's and the query's place in their residue
    class, `-(w - 1) .. w - 1`; both ends occur at borders. It is added after scaling, as in the
    authors' code; the papers' formula divides it by `sqrt(d)` too.

    Attributes:
        table: float `(H, 2 w - 1, ...)`, an axis for each of the grid; entry `t - p + w - 1`.
        mask: the pattern; its windows are odd and no axis is causal.
    """

    table: Tensor
    mask: Neighborhood

    def __post_init__(self) -> None:
        window, causal = self.window, any(x[4] for x in self.mask.rules)
        if causal or any(w % 2 == 0 for w in window):
            raise ValueError(
                "NeighborhoodBias: expected odd windows and no causal axis, got window "
                f"{self.mask.window} and causal {self.mask.causal}"
            )
        want = tuple(2 * w - 1 for w in window)
        if tuple(self.table.shape[1:]) != want:
            raise ValueError(
                f"NeighborhoodBias: table has shape {tuple(self.table.shape)}, expected "
                f"(heads, {', '.join(map(str, want))}) for window {window}"
            )

    @property
    def window(self) -> tuple[int, ...]:
        return per_axis("window", self.mask.window, len(self.mask.grid))

    @property
    def heads(self) -> int | None:
        return self.table.shape[0]

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        self.mask.check(n, m)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def entry(self, i: Tensor, j: Tensor) -> Tensor:
        """Where the pairs' values stand in a head's flattened table; pairs that the pattern does not
        allow get any entry."""
        q, k = self.mask.at(i), self.mask.at(j)
        found = torch.zeros_like(i + j)
        for x, y, w, d in zip(q, k, self.window, self.mask.steps, strict=True):
            step = torch.div(y, d, rounding_mode="floor") - torch.div(x, d, rounding_mode="floor")
            found = found * (2 * w - 1) + (step + w - 1).clamp(0, 2 * w - 2)
        return found

    def scores(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        entry, flat = self.entry(i, j), self.table.flatten(1)
        shape = joint_shape(i, j, h, b)
        if entry.dim() < 2 or not per_plane(h) or entry.shape[-2:].numel() != entry.numel():
            return flat[h, entry].expand(shape)
        # One plane of entries for all heads: rows of the table are picked, then their columns.
        head = torch.as_tensor(per_plane_index(h), device=flat.device)
        rows = flat.index_select(0, head.reshape(-1)).index_select(1, entry.reshape(-1))
        return rows.view(*head.shape, *entry.shape[-2:]).expand(shape)

    def accumulate(
        self,
        buffers: tuple[Tensor | None, ...],
        grad: Tensor,
        i: Tensor,
        j: Tensor,
        h: Index = 0,
        b: Index = 0,
    ) -> None:
        buffer, entry = buffers[0], self.entry(i, j)
        if buffer is None or not self.table.requires_grad:
            return
        if entry.dim() < 2 or not per_plane(h) or entry.shape[-2:].numel() != entry.numel():
            super().accumulate(buffers, grad, i, j, h, b)
            return
        lead = grad.shape[:-2]
        sums = grad.new_zeros(math.prod(lead), self.table[0].numel())
        sums.index_add_(1, entry.reshape(-1), grad.reshape(len(sums), -1))
        head = torch.as_tensor(per_plane_index(h), device=grad.device).expand(lead).reshape(-1)
        whole = sums.new_zeros(len(self.table), sums.shape[1]).index_add_(0, head, sums)
        buffer += whole.view(self.table.shape).to(buffer.dtype)
