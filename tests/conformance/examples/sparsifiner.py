"""Sparsifiner: attention to lists of keys, the predictor's scores, the layer, the block."""

from __future__ import annotations

import torch
from torch import nn

from regard.sparse.sparsifiner import (
    ConnectivityPredictor,
    SparsifinerAttention,
    connected_attend,
)
from regard.sparse.sparsifiner_model import Sparsifiner, SparsifinerBlock
from tests.conformance import AttentionExample, ModuleExample

TOKENS = 10


def _mask(q, k):
    """Lists of different lengths for every head, the same for every batch; some rows have none."""
    h, n, m = q.shape[1], q.shape[2], k.shape[2]
    head, row, key = (torch.arange(x) for x in (h, n, m))
    mask = (row[:, None] * 3 + key * 5 + head[:, None, None] * 2) % 4 < 2
    mask[-1, n // 2] = False
    mask[:, 0] = True
    return mask.expand(q.shape[0], h, n, m)


def _attend(q, k, v):
    return connected_attend(q, k, v, _mask(q, k))


def _definition(q, k, v):
    mask = _mask(q, k)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return torch.where(mask.any(-1, keepdim=True), out, 0.0)


class _Scores(nn.Module):
    """Both forms of the predictor's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = ConnectivityPredictor(12, 2, TOKENS, reduce_n=2, basis_topk=3)

    def forward(self, q, k):
        return self.predictor(q, k)[0], self.predictor.signed(q, k)


class _Learning(nn.Module):
    """A layer or a block as it is trained: all its parameters have a part."""

    def __init__(self, block: bool) -> None:
        super().__init__()
        layer: nn.Module = SparsifinerAttention(12, TOKENS, heads=2, keep=0.3, reduce_n=2)
        self.layer = SparsifinerBlock(layer, mlp_ratio=2) if block else layer

    def forward(self, x):
        return self.layer(x), *self.layer.reconstruct(x)


def rand(*shapes):
    def inputs(dtype):
        g = torch.Generator().manual_seed(1)
        return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)

    return inputs


EXAMPLES = [
    AttentionExample(
        _attend,
        _definition,
        bad=(
            (
                lambda: connected_attend(
                    *[torch.zeros(1, 1, 2, 3)] * 3, torch.ones(1, 1, 2, 3) > 0
                ),
                r"mask must be bool \(1, 1, 2, 2\), got torch.bool \(1, 1, 2, 3\)",
            ),
        ),
    ),
    ModuleExample(
        _Scores,
        rand((2, 2, TOKENS, 6), (2, 2, TOKENS, 6)),
        bad=(
            (
                lambda: ConnectivityPredictor(12, 2, 9)(*[torch.zeros(1, 2, 8, 6)] * 2),
                r"q has shape \(1, 2, 8, 6\), expected \(1, 2, 9, 6\)",
            ),
            (lambda: ConnectivityPredictor(12, 2, 9, keep=1.5), "keep must lie in"),
        ),
    ),
    *(
        ModuleExample(
            lambda block=block: _Learning(block),
            rand((2, TOKENS, 12)),
            bad=(
                (
                    lambda: SparsifinerAttention(12, 9, 2)(torch.zeros(1, 10, 12)),
                    r"expected \(batch, 9, 12\)",
                ),
                (lambda: Sparsifiner(image=30), "patch 16 does not divide image 30"),
            ),
        )
        for block in (False, True)
    ),
]
