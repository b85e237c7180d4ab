"""Attention written out with plain torch in float64: what every backend is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with an explicit bool mask; keyless rows give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias
    if allowed is None:
        allowed = torch.ones(s.shape[-2:], dtype=torch.bool)
    allowed = allowed.expand(s.shape)
    empty = ~allowed.any(-1)
    s = s.masked_fill(~allowed, float("-inf")).masked_fill(empty[..., None], 0.0)
    out = torch.softmax(s, -1) @ v
    lse = torch.logsumexp(s, -1).masked_fill(empty, float("-inf"))
    return out.masked_fill(empty[..., None], 0.0), lse
