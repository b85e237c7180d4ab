"""Combiner: its patterns as functions and as layers."""

from __future__ import annotations

import torch

from regard.sparse.combiner import CombinerCache, combiner_attention
from regard.sparse.combiner_module import Combiner, CombinerRowMajor, rowmajor_attention
from regard.sparse.combiner_probs import combiner_probs
from tests.conformance import AttentionExample, ModuleExample


def _fast(pattern, seg, causal=True, running="max"):
    return lambda q, k, v: combiner_attention(q, k, v, pattern, seg, causal, running=running)


def _definition(pattern, seg, causal=True, running="max"):
    def weigh(q, k, v):
        probs = combiner_probs(q, k, pattern, seg, causal, running=running)
        return probs @ v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    return weigh


def _zeros(*shape):
    return torch.zeros(*shape)


def _form(pattern, seg, lengths, causal=True, running="max"):
    x = _zeros(1, 2, 6, 4)
    return AttentionExample(
        _fast(pattern, seg, causal, running),
        _definition(pattern, seg, causal, running),
        lengths=lengths,
        causal=causal,
        bad=(
            (lambda: combiner_attention(x, x, x, "square"), "pattern must be one of"),
            (lambda: combiner_attention(x, x, x, pattern, 0, causal), "seg must be an integer"),
            (lambda: combiner_attention(x, x[:, :, :4], x, pattern, 2, causal), "same tokens"),
            (lambda: combiner_attention(x, x, x, "fixed", 4), "6 tokens for seg=4"),
            (lambda: combiner_attention(x, x, x, "log", causal=False), "causal=False is for"),
            (lambda: combiner_attention(x, x, x, "axial", 2, running="mean"), "'max' or 'sum'"),
            (lambda: combiner_attention(x, x, x, "log", running="sum"), "is for 'axial'"),
            (lambda: combiner_attention(_zeros(1, 3, 6, 4), x, x, "log"), "does not divide q's 3"),
        ),
    )


X = _zeros(1, 2, 6, 4)

EXAMPLES = [
    _form("fixed", 5, ((5, 5), (35, 35))),
    _form("fixed", 1, ((1, 1), (7, 7))),
    _form("fixed", 5, ((5, 5), (35, 35)), causal=False),
    _form("log", 4, ((1, 1), (7, 7), (33, 33))),
    _form("axial", 4, ((4, 4), (28, 28))),
    _form("axial", 3, ((6, 6), (21, 21)), running="sum"),
    *(
        ModuleExample(
            lambda pattern=pattern, causal=causal: Combiner(12, 3, pattern, 4, causal),
            lambda dtype: (torch.linspace(-1, 1, 2 * 12 * 12).sin().view(2, 12, 12).to(dtype),),
            causal=causal,
            bad=(
                (lambda: Combiner(12, 5), "heads must divide dim"),
                (lambda: Combiner(12, 3, "log").new_cache(), "decoding needs pattern='fixed'"),
                (lambda: CombinerCache(0), "group must be an integer >= 1"),
            ),
        )
        for pattern, causal in (("fixed", True), ("log", True))
    ),
    ModuleExample(
        lambda: CombinerRowMajor(12, 3, 4),
        lambda dtype: (torch.linspace(-1, 1, 2 * 12 * 12).sin().view(2, 12, 12).to(dtype),),
        causal=True,
        bad=(
            (lambda: CombinerRowMajor(12, 3, 4, "sum"), "keys must be one of"),
            (lambda: CombinerRowMajor(12, 3, 5)(torch.zeros(1, 12, 12)), "whole rows"),
            (
                lambda: rowmajor_attention(*[_zeros(1, 2, 6, 4)] * 3, 4, *[_zeros(1, 2, 6, 4)] * 2),
                "6 tokens",
            ),
        ),
    ),
]
