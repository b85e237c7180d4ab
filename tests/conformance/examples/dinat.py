"""DiNAT: dilated attention with a relative bias, a layer, a small classifier."""

from __future__ import annotations

import torch

from regard.patterns.dinat import (
    DilatedNeighborhoodAttention,
    DiNAT,
    DiNATLayer,
    Variant,
    dinat,
)
from regard.patterns.neighborhood import Neighborhood
from tests.conformance import MaskExample, ModuleExample
from tests.conformance.examples.gna import definition

AREA = Neighborhood((9, 7), 3, dilation=(3, 2))


def _map(dtype):
    return (torch.randn(2, 7, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype),)


def _image(dtype):
    return (torch.rand(1, 3, 28, 24, generator=torch.Generator().manual_seed(0)).to(dtype),)


EXAMPLES = [
    MaskExample(AREA, 63, 63, definition(AREA)),
    ModuleExample(
        lambda: DilatedNeighborhoodAttention(8, 2, 3, 2),
        _map,
        bad=(
            (lambda: DilatedNeighborhoodAttention(8, 2, 4), "odd windows"),
            (lambda: DilatedNeighborhoodAttention(8, 2, 3, causal=True), "no causal axis"),
        ),
    ),
    ModuleExample(
        lambda: DiNATLayer(8, 2, (3, 5), (2, 1), layer_scale=0.1),
        _map,
        bad=((lambda: DiNATLayer(8, 3, 3), "do not divide"),),
    ),
    ModuleExample(
        lambda: DiNAT(Variant((1, 2), 8, (1, 2), 2.0, 0.0, dilations=(1, 1)), 4, 3),
        _image,
        bad=((lambda: dinat("dinat"), "variant must be one of"),),
    ),
]
