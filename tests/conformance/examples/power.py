"""PowerAttention: its mask, and attention over a prompt and over a cache."""

from __future__ import annotations

import torch

from regard.patterns.power import power_attention, power_mask
from tests.conformance import AttentionExample, MaskExample
from tests.core.dense import dense_attention


def _definition(n, m, block=4, window=2, sinks=1):
    out = torch.zeros(n, m, dtype=torch.bool)
    powers = {0, *(2**e for e in range(32))}
    for row in range(n):
        i = row + m - n
        for j in range(i + 1):
            beta = i // block - j // block
            out[row, j] = beta < window or beta in powers or j // block < sinks
    return out


def _fast(q, k, v):
    return power_attention(q, k, v, 4, 2)


def _dense(q, k, v):
    return dense_attention(q, k, v, _definition(q.shape[2], k.shape[2]))[0]


EXAMPLES = [
    MaskExample(power_mask(4, 2), 53, 53, _definition, causal=True),
    MaskExample(power_mask(4, 2), 9, 70, _definition, causal=True),
    MaskExample(power_mask(1, 1, 0), 33, 40, lambda n, m: _definition(n, m, 1, 1, 0), causal=True),
    AttentionExample(
        _fast,
        _dense,
        causal=True,
        bad=(
            (lambda: power_mask(0), "block must be an integer >= 1"),
            (lambda: power_mask(4, 0), "window must be an integer >= 1"),
            (lambda: power_mask(4, 1, -1), "sink_blocks must be an integer >= 0"),
            (lambda: _fast(*torch.randn(3, 1, 1, 0, 4)), "expected N >= 1"),
            (
                lambda: _fast(torch.randn(1, 1, 5, 4), *torch.randn(2, 1, 1, 3, 4)),
                "as many keys as queries",
            ),
        ),
    ),
]
