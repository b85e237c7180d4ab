"""TransNormerLLM: attention with and without LRPE, block, gated linear unit, low-rank variant."""

from __future__ import annotations

import torch

from regard.linear.tnl import SGLU, TNLAttention, TNLBlock, TNLLowRankGate
from regard.linear.tnl_model import TransNormerLLM
from tests.conformance import ModuleExample


def tokens(*shape):
    def inputs(dtype):
        return (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),)

    return inputs


ids = torch.zeros(1, 3, dtype=torch.long)

EXAMPLES = [
    ModuleExample(
        lambda: TNLAttention(12, 3, 0, 2),
        tokens(2, 9, 12),
        causal=True,
        bad=(
            (lambda: TNLAttention(12, 5, 0, 2), "heads must divide dim 12, got 5"),
            (lambda: TNLAttention(12, 3, 0, 1), "num_layers >= 2"),
            (lambda: TNLAttention(12, 3, 2, 2), "layer must be in"),
        ),
    ),
    ModuleExample(
        lambda: TNLBlock(8, 2, 20, 1, 3),
        tokens(1, 70, 8),
        causal=True,
        bad=((lambda: TNLBlock(8, 3, 20, 1, 3), "heads must divide dim 8"),),
    ),
    ModuleExample(
        lambda: TNLLowRankGate(8, 2, 1, 3),
        tokens(2, 11, 8),
        causal=True,
        bad=(
            (lambda: TNLLowRankGate(8, 0, 1, 3), "heads must divide dim 8, got 0"),
            (lambda: TransNormerLLM(5, 8, 1, 2), "layers must be >= 2, got 1"),
            (lambda: TransNormerLLM(5, 8, 2, 2)(ids[0]), "ids must be"),
            (lambda: TransNormerLLM(5, 8, 2, 2)(ids, state=()), "state has 0 layers"),
            (lambda: TransNormerLLM(5, 8, 2, 2).generate(ids[:, :0], 3), "a token at least"),
            (
                lambda: TransNormerLLM(5, 8, 2, 2).generate(ids, 3, temperature=-1.0),
                "temperature must be >= 0",
            ),
        ),
    ),
    ModuleExample(
        lambda: SGLU(8, 12),
        tokens(2, 3, 8),
        causal=True,
        bad=((lambda: TNLAttention(8, 0, 0, 2), "heads must divide"),),
    ),
]
