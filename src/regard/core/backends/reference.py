"""The definition of attention: quadratic, any dtype, obviously right. All others agree with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, compute_dtype


def why_not(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """Serves everything."""
    return None


def scores(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """``scale * q k^T + bias`` with -inf where a query may not look, ``(B, H, N, M)``."""
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    dtype = compute_dtype(q.dtype)
    keys = k.to(dtype).repeat_interleave(group, dim=1)
    s = (q.to(dtype) @ keys.transpose(-1, -2)) * call.scale
    if call.bias is not None:
        i = torch.arange(m - n, m, device=q.device)[:, None]
        j = torch.arange(m, device=q.device)[None, :]
        h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
        b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
        s = s + call.bias.scores(i, j, h, b).to(dtype)
    allowed = allowed_pairs(q, k, call)
    return s if allowed is None else s.masked_fill(~allowed, float("-inf"))


def allowed_pairs(q: Tensor, k: Tensor, call: Call) -> Tensor | None:
    """Where the call's mask and layout let a query look: bool, broadcastable to (B, H, N, M)."""
    if call.layout is not None:
        dense = call.layout.dense().to(q.device)
        shared = dense.shape[1] not in (1, q.shape[1])
        return dense.repeat_interleave(q.shape[1] // dense.shape[1], 1) if shared else dense
    return None if call.mask is None else call.mask.dense(q.shape[2], k.shape[2], device=q.device)


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Softmax over all allowed keys; rows without keys give 0 and -inf."""
    s = scores(q, k, call)
    empty = (s == float("-inf")).all(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), dim=-1)
    weights = torch.exp(s.masked_fill(empty, float("-inf")) - lse.unsqueeze(-1))
    if call.dropout > 0.0:
        kept = torch.rand(s.shape, generator=call.generator, device=s.device) >= call.dropout
        weights = weights * kept / (1.0 - call.dropout)
    values = v.to(s.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out = (weights @ values).to(q.dtype)
    return out, lse.masked_fill(empty.squeeze(-1), float("-inf"))
