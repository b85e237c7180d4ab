"""Attention inside clusters of tokens: gather, attend under positions, scatter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.attend import attend
from regard.core.call import compute_dtype
from regard.core.layout import BlockLayout, Index
from regard.core.mask import Mask
from regard.core.masks import Causal, SlidingWindow
from regard.core.merge import merge

# Query rows of a block where a mask of positions is evaluated.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Members(Mask):
    """Members of clusters that may see each other; each cluster of a head counts as a head.

    Args:
        at_q, at_k: positions of the members, int64 `(B, L, w)` and `(B, L, w')`, -1 for none.
        causal: whether a member sees none that comes later.
    """

    at_q: Tensor
    at_k: Tensor
    causal: bool

    @property
    def heads(self) -> int | None:
        return self.at_q.shape[1]

    @property
    def batch(self) -> int | None:
        return self.at_q.shape[0]

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        key = self.at_k.to(j.device)[b, h, j]
        if not self.causal:
            return (key >= 0) & torch.ones_like(i, dtype=torch.bool)
        row = i - (self.at_k.shape[2] - self.at_q.shape[2])
        return (key >= 0) & (key <= self.at_q.to(i.device)[b, h, row])


def members(x: Tensor, lists: Tensor) -> Tensor:
    """Rows of `x` `(B, H, N, D)` by cluster, `(B, H * C, w, D)`; -1 reads row 0."""
    at = lists.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, at).unflatten(2, lists.shape[2:]).flatten(1, 2)


def inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at_q: Tensor,
    at_k: Tensor,
    *,
    ranked: bool,
    causal: bool,
    scale: float,
    self_score: float | None,
) -> Tensor:
    """Attention inside each cluster, `(B, H * C, w, Dv)`.

    Args:
        ranked: lists coincide and rows see no later ones: their ranks say who is later, and missing
            members stand behind all real ones.
    """
    mask: Mask | None = None
    if ranked:
        mask = Causal()
    elif causal or bool((at_k < 0).any()):
        mask = Members(at_q.flatten(1, 2), at_k.flatten(1, 2), causal)
    if self_score is None:
        out: Tensor = attend(q, k, v, scale=scale, **_where(q, k, mask))
        return out
    others = ~SlidingWindow(0) if mask is None else mask & ~SlidingWindow(0)
    out, lse = attend(q, k, v, scale=scale, return_lse=True, **_where(q, k, others))
    return merge([(out, lse), (v, torch.full_like(lse, self_score))])[0]


def _where(q: Tensor, k: Tensor, mask: Mask | None) -> dict[str, Any]:
    """How to tell `attend` the mask: one of positions has no closed form, so its layout is all."""
    if mask is None or mask.constant or q.numel() == 0:
        return {"mask": mask}
    n, m = q.shape[2], k.shape[2]
    side = min(n, _ROWS)
    index = torch.zeros(1, 1, -(-n // side), 1, dtype=torch.int64, device=q.device)
    plain = torch.zeros_like(index, dtype=torch.bool)
    return {"layout": BlockLayout(n, m, side, m, index, plain).under(mask)}


def scattered(found: Tensor, lists: Tensor, n: int, eps: float) -> Tensor:
    """The mean over the clusters that a token is in, `(B, H, N, Dv)`."""
    b, h = lists.shape[:2]
    dtype = compute_dtype(found.dtype)
    real = (lists >= 0).flatten(2)
    at = lists.clamp(min=0).flatten(2)
    rows = found.unflatten(1, (h, -1)).flatten(2, 3).to(dtype) * real[..., None]
    total = rows.new_zeros(b, h, n, rows.shape[-1])
    total = total.scatter_add(2, at[..., None].expand_as(rows), rows)
    count = rows.new_zeros(b, h, n).scatter_add_(2, at, real.to(dtype))
    return (total / (count + eps)[..., None]).to(found.dtype)
