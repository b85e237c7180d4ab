"""Landmark Attention: the grouped softmax over a prompt and over a cache, and the layer."""

from __future__ import annotations

import torch

from regard.sparse.landmark import landmark_attention
from regard.sparse.landmark_layer import LandmarkAttention
from tests.conformance import AttentionExample, ModuleExample


def _marks(m, every=5):
    return torch.arange(m) % every == every - 1


def _fast(q, k, v):
    return landmark_attention(q, k, v, _marks(k.shape[2]))


def _definition(q, k, v):
    """The two softmaxes as masked dense ones, one for each block."""
    n, m = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    marked = _marks(m)
    block = marked.long().cumsum(0) - marked.long()
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    earlier = block < block[m - n :, None]
    first = (j <= i) & ((~marked & ~earlier) | (marked & earlier))
    p1 = logits.masked_fill(~first, -torch.inf).softmax(-1).nan_to_num(0.0)
    weights = p1 * ~marked
    for at in marked.nonzero().flatten().tolist():
        tokens = (block == block[at]) & ~marked
        p2 = logits.masked_fill(~tokens, -torch.inf).softmax(-1).nan_to_num(0.0)
        weights = weights + p1[..., at : at + 1] * p2
    return weights @ v


def _inputs(dtype):
    x = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype), _marks(13, 4)


EXAMPLES = [
    AttentionExample(
        _fast,
        _definition,
        causal=True,
        bad=(
            (
                lambda: landmark_attention(*torch.randn(3, 1, 1, 4, 4), torch.zeros(4)),
                "is_landmark is torch.float32",
            ),
            (
                lambda: _fast(torch.randn(1, 1, 5, 4), *torch.randn(2, 1, 1, 3, 4)),
                "5 queries and 3 keys",
            ),
        ),
    ),
    ModuleExample(
        lambda: LandmarkAttention(8, 4, kv_heads=2, bias=True),
        _inputs,
        causal=True,
        bad=(
            (lambda: LandmarkAttention(8, 3), "3 heads do not divide dim 8"),
            (lambda: LandmarkAttention(8, 4, kv_heads=3), "3 key heads do not divide 4 heads"),
        ),
    ),
]
