"""Examples of MambaOut: the block on images and sequences, a small network."""

from __future__ import annotations

import torch

from regard.linear.mambaout import GatedCNNBlock, MambaOut
from tests.conformance import ModuleExample


def given(*shape):
    def inputs(dtype):
        return (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),)

    return inputs


EXAMPLES = [
    ModuleExample(
        lambda: GatedCNNBlock(6, kernel=3),
        given(2, 5, 4, 6),
        bad=((lambda: GatedCNNBlock(4, kernel=2), "kernel must be odd, got 2"),),
    ),
    ModuleExample(
        lambda: GatedCNNBlock(6, kernel=3, causal=True),
        given(2, 9, 6),
        bad=((lambda: GatedCNNBlock(4, conv_ratio=0.0), "makes 0 channels"),),
    ),
    ModuleExample(
        lambda: MambaOut((1, 1), (8, 12), 3),
        given(2, 3, 16, 16),
        bad=((lambda: MambaOut((1,), (8, 12), 3), "equally many, got 1 and 2"),),
    ),
]
