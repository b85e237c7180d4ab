"""PyTorch's own fused attention, where the call needs nothing that it ignores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..masks import Causal, Full, Mask

# A mask tensor handed to SDPA is quadratic: beyond this many elements `blocks` is the better choice.
_DENSE_LIMIT = 1 << 26


def plain(mask: Mask | None, n: int, m: int) -> str | None:
    """ "full" or "causal" when the mask is one that SDPA knows without a tensor, else None."""
    if mask is None or isinstance(mask, Full):
        return "full"
    if isinstance(mask, Causal):
        if n == 1:
            return "full"
        if n == m:
            return "causal"
    return None


def why_not(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """SDPA serves no log-sum-exp, no bias and no layout; masks that it does not know cost a tensor."""
    if call.need_lse:
        return "PyTorch's SDPA does not return the log-sum-exp"
    if call.layout is not None:
        return "PyTorch's SDPA ignores layouts"
    if call.bias is not None:
        return "biases are served by the other backends"
    if call.generator is not None and call.dropout > 0.0:
        return "PyTorch's SDPA takes no generator for dropout"
    n, m = q.shape[2], k.shape[2]
    if m == 0:
        return "no keys"
    if plain(call.mask, n, m) is None and n * m > _DENSE_LIMIT:
        return f"the mask would be a dense tensor of {n} x {m}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, None]:
    """Attention through ``scaled_dot_product_attention``, groups of queries without copies of keys."""
    b, h, n, _ = q.shape
    hkv, m, dv = k.shape[1], k.shape[2], v.shape[3]
    group = h // hkv
    q, k, v = _even_width(q, k, v)
    kind = plain(call.mask, n, m)
    p, scale = call.dropout, call.scale
    if kind == "causal":
        grouped = q.reshape(b, hkv, group, n, q.shape[-1])
        parts = [
            F.scaled_dot_product_attention(
                grouped[:, :, g], k, v, is_causal=True, dropout_p=p, scale=scale
            )
            for g in range(group)
        ]
        out = parts[0] if group == 1 else torch.stack(parts, dim=2).flatten(1, 2)
    elif kind == "full":
        folded = q.reshape(b, hkv, group * n, q.shape[-1])
        out = F.scaled_dot_product_attention(folded, k, v, dropout_p=p, scale=scale).reshape(
            b, h, n, -1
        )
    else:
        assert call.mask is not None
        allowed = call.mask.dense(n, m, device=q.device)
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p, scale=scale)
        out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return out[..., :dv], None


def _even_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-pad to one width that is a multiple of 8: the fused kernels want nothing else."""
    d, dv = q.shape[-1], v.shape[-1]
    width = -(-max(d, dv) // 8) * 8
    if d < width:
        q, k = F.pad(q, (0, width - d)), F.pad(k, (0, width - d))
    if dv < width:
        v = F.pad(v, (0, width - dv))
    return q, k, v
