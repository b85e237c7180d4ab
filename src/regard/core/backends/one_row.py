"""One query a head over chosen key blocks, as in a decoding step: gather the keys, one small product.

Nothing is tiled: planning tiles for a single row takes longer than computing it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, compute_dtype


def serves(q: Tensor, call: Call) -> bool:
    """Whether a call is one plain row: no bias, no dropout, blocks in their order."""
    layout = call.layout
    plain = layout is not None and not layout.permuted and call.bias is None
    return plain and len(q) > 0 and q.shape[2] == 1 and call.dropout == 0.0


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Output ``(B, H, 1, Dv)`` and log-sum-exp ``(B, H, 1)``; differentiable."""
    assert call.layout is not None
    batch, heads = q.shape[:2]
    keys, real = _keys(call, heads, q.device)
    # Lists of the key heads where they are shared by the query heads, else of each query head.
    lists = k.shape[1] if keys.shape[1] in (1, k.shape[1]) else heads
    at = keys.expand(batch, lists, -1)
    wide = compute_dtype(q.dtype)
    near_k, near_v = (_gather(x, at, lists).to(wide) for x in (k, v))
    rows = q.to(wide).reshape(batch, lists, heads // lists, q.shape[3])
    scores = (rows @ near_k.mT * call.scale).view(batch, heads, -1)
    hidden = ~real.expand(batch, real.shape[1], -1)
    hidden = hidden.repeat_interleave(heads // hidden.shape[1], 1)
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).masked_fill(hidden, 0.0)
    out = weights.view(batch, lists, heads // lists, -1) @ near_v
    lse = scores.logsumexp(-1, keepdim=True) if call.need_lse else None
    return out.reshape(batch, heads, 1, -1).to(q.dtype), lse


def _keys(call: Call, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the listed keys ``(Bl, Hl, S)``, and which of them the row sees."""
    layout = call.layout
    assert layout is not None
    index, side, m = layout.index[:, :, 0], layout.block_k, layout.m
    at = index[..., None] * side + torch.arange(side, device=device)
    real = (index >= 0)[..., None] & (at < m)
    at = at.clamp(0, m - 1)
    if layout.mask is not None and bool(layout.partial.any()):
        h = torch.arange(index.shape[1], device=device)[:, None, None]
        b = torch.arange(index.shape[0], device=device)[:, None, None, None]
        real = real & layout.mask.allows(torch.full_like(at, m - 1), at, h, b)
    return at.flatten(2), real.flatten(2)


def _gather(x: Tensor, at: Tensor, lists: int) -> Tensor:
    """Rows ``at`` ``(B, L, S)`` of ``x`` ``(B, Hkv, M, D)``: ``(B, L, S, D)``; a slice of a larger cache
    is read in place."""
    batch, kv, m, width = x.shape
    group = lists // kv
    shape = (batch, lists, at.shape[2], width)
    learned = torch.is_grad_enabled() and x.requires_grad
    strides = x.stride()
    if learned or strides[2:] != (width, 1) or any(stride % width for stride in strides[:2]):
        parts = [
            x[b, h // group].index_select(0, at[b, h]) for b in range(batch) for h in range(lists)
        ]
        return torch.stack(parts).view(shape)
    apart = [stride // width for stride in strides[:2]]
    rows = x.as_strided(((batch - 1) * apart[0] + (kv - 1) * apart[1] + m, width), (width, 1))
    head = torch.arange(lists, device=x.device) // group * apart[1]
    first = torch.arange(batch, device=x.device)[:, None] * apart[0] + head
    return rows.index_select(0, (at + first[..., None]).flatten()).view(shape)
