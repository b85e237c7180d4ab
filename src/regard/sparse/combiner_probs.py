"""Combiner's attention matrix written out from its regions, in float64: the definition for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .combiner_log import levels

# direct keys, and regions as lists of keys
Support = tuple[list[int], list[list[int]]]


def support(i: int, n: int, pattern: str, seg: int, causal: bool = True) -> Support:
    """Direct keys and regions of query `i` among `n` tokens (arXiv 2107.05768, section 4)."""
    if pattern == "fixed":
        segments = [list(range(start, start + seg)) for start in range(0, n, seg)]
        if not causal:
            return segments[i // seg], segments
        return list(range(i // seg * seg, i + 1)), segments[: i // seg]
    if pattern == "log":
        found = []
        for bit in range(levels(n)):
            if i >> bit & 1:
                stop = (i >> bit) << bit
                found.append(list(range(stop - (1 << bit), stop)))
        return [i], found
    r, c = divmod(i, seg)
    direct = list(range(r * seg, i + 1)) + [row * seg + c for row in range(r)]
    above = [[row * seg + col for row in range(r)] for col in range(seg) if col != c]
    left = [list(range(row * seg, row * seg + c)) for row in range(r)]
    right = [list(range(row * seg + c + 1, (row + 1) * seg)) for row in range(r)]
    return direct, [region for region in (*above, *left, *right) if region]


def combiner_probs(
    q: Tensor,
    k: Tensor,
    pattern: str = "fixed",
    seg: int = 128,
    causal: bool = True,
    *,
    running: str = "max",
) -> Tensor:
    """The weights that :func:`~regard.sparse.combiner.combiner_attention` implies, key by key.

    Quadratic and slow: one query after the other, one region after the other.

    Args:
        q: `(B, H, N, D)`, not scaled.
        k: `(B, Hkv, N, D)`.
        pattern, seg, causal, running: as `combiner_attention`.

    Returns:
        `(B, H, N, N)` in float64; rows sum to 1.
    """
    b, h, n, d = q.shape
    q = q.double() * d**-0.5
    k = k.double().repeat_interleave(h // k.shape[1], dim=1)
    out = q.new_zeros(b, h, n, n)
    for i in range(n):
        direct, regions = support(i, n, pattern, seg, causal)
        scores = [(q[:, :, i] * k[:, :, j]).sum(-1) for j in direct]
        for region in regions:
            scores.append((q[:, :, i] * _pooled(k[:, :, region], running)).sum(-1))
        weights = torch.stack(scores, -1).softmax(-1)
        for at, j in enumerate(direct):
            out[:, :, i, j] += weights[..., at]
        for at, region in enumerate(regions, len(direct)):
            query = _pooled(q[:, :, region], running)
            inside = (k[:, :, region] @ query[..., None])[..., 0].softmax(-1)
            out[:, :, i, region] += weights[..., at, None] * inside
    return out


def _pooled(x: Tensor, running: str) -> Tensor:
    return x.amax(2) if running == "max" else x.sum(2)
