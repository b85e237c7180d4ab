"""Faster neighbourhood attention: plain, dilated and causal windows, fused in both forms."""

from __future__ import annotations

import torch

from regard.patterns.fna import fused_na, na_av, na_qk
from regard.patterns.neighborhood import Neighborhood, NeighborhoodAttention
from tests.conformance import AttentionExample, MaskExample, ModuleExample
from tests.conformance.examples.gna import definition
from tests.core.dense import dense_attention

AREA = Neighborhood((8, 6), (3, 4), causal=(False, True))
VOLUME = Neighborhood((3, 5, 6), (2, 3, 3), dilation=(1, 1, 2))


def _causal(q, k, v, tile):
    back = (x.transpose(1, 2) for x in (q, k, v))
    w = min(5, k.shape[2])
    return fused_na(*back, w, 1, True, *tile).transpose(1, 2)


def _causal_definition(q, k, v):
    n = k.shape[2]
    return dense_attention(q, k, v, definition(Neighborhood((n,), min(5, n), causal=True))(n, n))[0]


def _unfused(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    w, d = (3, 2) if k.shape[1] >= 6 else (1, 1)
    return na_av(na_qk(q, k, w, d).softmax(-1), v, w, d).transpose(1, 2)


def _unfused_definition(q, k, v):
    n = k.shape[2]
    w, d = (3, 2) if n >= 6 else (1, 1)
    return dense_attention(q, k, v, definition(Neighborhood((n,), w, 1, d))(n, n))[0]


def _line(dtype):
    return (torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0)).to(dtype),)


BAD = ((lambda: fused_na(*torch.randn(3, 1, 8, 1, 4), 3, q_tile=(2,)), "come together"),)
LENGTHS = ((1, 1), (7, 7), (65, 65), (33, 33))
EXAMPLES = [
    MaskExample(AREA, 48, 48, definition(AREA)),
    MaskExample(VOLUME, 90, 90, definition(VOLUME)),
    AttentionExample(
        lambda q, k, v: _causal(q, k, v, ()),
        _causal_definition,
        lengths=LENGTHS,
        causal=True,
        bad=BAD,
    ),
    AttentionExample(
        lambda q, k, v: _causal(q, k, v, ((4,), (3,))),
        _causal_definition,
        lengths=LENGTHS,
        causal=True,
        bad=BAD,
    ),
    AttentionExample(_unfused, _unfused_definition, lengths=LENGTHS, bad=BAD),
    ModuleExample(
        lambda: NeighborhoodAttention(8, 2, 4, dilation=2, causal=True),
        _line,
        causal=True,
        bad=((lambda: Neighborhood((7,), 4, dilation=2), "larger than the 7 positions"),),
    ),
]
