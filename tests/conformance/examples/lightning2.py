"""Lightning Attention-2: with the authors' slopes, without decay, and both ways."""

from __future__ import annotations

import torch

from regard.linear.lightning2 import decay_slopes, lightning_attention
from tests.conformance import AttentionExample


def _definition(slopes, causal=True):
    def dense(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        at = torch.arange(q.shape[2], dtype=q.dtype)
        apart = (at[:, None] - at).abs()
        weight = torch.exp(-apart * slopes.to(q.dtype)[:, None, None])
        weight = weight.tril() if causal else weight
        return (q @ k.mT * weight) @ v

    return dense


LENGTHS = ((1, 1), (7, 7), (65, 65), (130, 130))
q, kv = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)

EXAMPLES = [
    AttentionExample(
        lambda q, k, v: lightning_attention(q, k, v, decay_slopes(4)),
        _definition(decay_slopes(4)),
        lengths=LENGTHS,
        causal=True,
        bad=(
            (lambda: lightning_attention(q, kv, kv, -decay_slopes(4)), "slopes must be >= 0"),
            (lambda: lightning_attention(q, kv, kv, decay_slopes(3)), "for H heads of"),
            (
                lambda: lightning_attention(q, kv, kv, mask=torch.ones(1, 4, dtype=torch.bool)),
                r"mask must be bool \(1, 3\)",
            ),
            (lambda: lightning_attention(q, kv[:, :, :2], kv), "recur: k must be"),
            (lambda: decay_slopes(0), "heads must be >= 1, got 0"),
            (lambda: decay_slopes(4, 0, 1), "num_layers >= 2"),
            (lambda: decay_slopes(4, 3, 3), "layer must be in 0 .. num_layers - 1"),
        ),
    ),
    AttentionExample(
        lambda q, k, v: lightning_attention(q, k, v, chunk=16),
        _definition(torch.zeros(6)),
        heads=6,
        kv_heads=6,
        lengths=LENGTHS[:3],
        causal=True,
        bad=((lambda: lightning_attention(q, kv, kv, chunk=0), "chunk must be >= 1"),),
    ),
    AttentionExample(
        lambda q, k, v: lightning_attention(q, k, v, decay_slopes(4)[:, None, None], causal=False),
        _definition(decay_slopes(4), causal=False),
        lengths=LENGTHS[:3],
        bad=(
            (
                lambda: lightning_attention(q, kv, kv, causal=False, return_state=True),
                "has no delta rule and no state",
            ),
        ),
    ),
]
