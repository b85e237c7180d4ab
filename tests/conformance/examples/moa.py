"""MoA: the mask of spans in tokens and in blocks, and attention under it."""

from __future__ import annotations

import torch

from regard.sparse.moa import SinkBands, moa_attention
from tests.conformance import AttentionExample, MaskExample

SPANS, SINKS = (4, 9), 3


def _mask(bands, sinks, unit):
    def definition(n, m):
        out = torch.zeros(len(bands), n, m, dtype=torch.bool)
        for h, band in enumerate(bands):
            for row in range(n):
                i = row + m - n
                for j in range(i + 1):
                    out[h, row, j] = j // unit < sinks or i // unit - j // unit < band
        return out

    return definition


def _definition(q, k, v):
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    allowed = _mask([span - SINKS for span in SPANS], SINKS, 1)(n, m).repeat_interleave(group, 0)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


X = torch.zeros(1, 2, 4, 3)
EXAMPLES = [
    MaskExample(SinkBands((1, 4, 40), 3), 33, 33, _mask((1, 4, 40), 3, 1), causal=True),
    MaskExample(SinkBands((1, 2, 3), 1, 8), 9, 61, _mask((1, 2, 3), 1, 8), causal=True),
    AttentionExample(
        lambda q, k, v: moa_attention(q, k, v, list(SPANS), sinks=SINKS),
        _definition,
        causal=True,
        bad=(
            (lambda: moa_attention(X, X, X, [9]), "spans must be one for each"),
            (lambda: moa_attention(X, X, X, [9, 2], sinks=2), "larger than sinks=2"),
        ),
    ),
]
