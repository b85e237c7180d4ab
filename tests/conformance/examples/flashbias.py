"""FlashBias: ALiBi as factors, and two small networks that make factors."""

from __future__ import annotations

import torch

from regard import Causal, attend
from regard.patterns.flashbias import (
    NeuralBiasFactors,
    alibi_factors,
    factored_bias_attention,
    svd_factors,
)
from tests.conformance import AttentionExample, ModuleExample
from tests.core.dense import dense_attention


def _fast(q, k, v):
    phi_q, phi_k = alibi_factors(q.shape[2], k.shape[2], q.shape[1], k.shape[2] - q.shape[2])
    return factored_bias_attention(q, k, v, phi_q, phi_k, causal=True)


def _definition(q, k, v):
    n, m, h = q.shape[2], k.shape[2], q.shape[1]
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    slopes = 2.0 ** (-8.0 * torch.arange(1, h + 1).double() / h)
    bias = slopes[:, None, None] * (j - i)
    return dense_attention(q, k, v, j <= i, bias)[0]


def _call(q_rows: int):
    q = torch.randn(1, 2, 5, 4)
    return factored_bias_attention(q, q, q, torch.randn(2, q_rows, 3), torch.randn(2, 5, 3))


EXAMPLES = [
    AttentionExample(
        _fast,
        _definition,
        causal=True,
        bad=(
            (lambda: _call(4), "q_bias has shape"),
            (lambda: svd_factors(torch.randn(4, 4), rank=9), "rank must lie in 1..4"),
            (lambda: attend(*torch.randn(3, 1, 2, 5, 4), mask=Causal(), bias=3), "expected a Bias"),
        ),
    ),
    ModuleExample(
        lambda: NeuralBiasFactors(6, 5, heads=2, rank=3, hidden=8),
        lambda dtype: tuple(
            torch.randn(2, n, f, generator=torch.Generator().manual_seed(n)).to(dtype)
            for n, f in ((7, 6), (9, 5))
        ),
        bad=((lambda: NeuralBiasFactors(6, 5, 2, 0), "rank"),),
    ),
]
