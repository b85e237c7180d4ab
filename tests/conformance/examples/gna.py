"""Generalized neighbourhood attention: strided windows as masks, as a function and as a module."""

from __future__ import annotations

import torch

from regard.patterns.gna import end_to_end, simulate_tiles
from regard.patterns.neighborhood import (
    Neighborhood,
    NeighborhoodAttention,
    neighborhood_attention,
)
from tests.conformance import AttentionExample, MaskExample, ModuleExample
from tests.core.dense import dense_attention

LINE = Neighborhood((33,), 6, 4)
AREA = Neighborhood((7, 9), (4, 3), (2, 3), (1, 2))
CAUSAL = Neighborhood((40,), 8, 2, 2, True)


def definition(mask):
    """The rule in Python integers, axis by axis; axes join as a Kronecker product."""

    def dense(n, m):
        found = torch.ones(1, 1, dtype=torch.bool)
        for extent, w, s, d, causal in mask.rules:
            one = torch.zeros(extent, extent, dtype=torch.bool)
            for i in range(extent):
                places = range(i % d, extent, d)
                p, last = i // d, len(places) - 1
                lead = min(p // s * s + (s - 1 if causal else s // 2), last)
                lo = max(lead - w + 1, 0) if causal else min(max(lead - w // 2, 0), last + 1 - w)
                one[i, places[lo : p + 1 if causal else lo + w]] = True
            found = torch.kron(found, one)
        return found[m - n :]

    return dense


def _line(q, k, v):
    """Any length: a window of at most 6 with a stride of at most 4."""
    w = min(6, k.shape[2])
    back = (x.transpose(1, 2) for x in (q, k, v))
    return neighborhood_attention(*back, w, stride=min(4, w)).transpose(1, 2)


def _line_definition(q, k, v):
    n = k.shape[2]
    w = min(6, n)
    return dense_attention(q, k, v, definition(Neighborhood((n,), w, min(4, w)))(n, n))[0]


def _grid(dtype):
    return (torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype),)


EXAMPLES = [
    MaskExample(LINE, 33, 33, definition(LINE)),
    MaskExample(AREA, 63, 63, definition(AREA)),
    MaskExample(CAUSAL, 40, 40, definition(CAUSAL), causal=True),
    MaskExample(CAUSAL, 5, 40, definition(CAUSAL), causal=True),
    AttentionExample(
        _line,
        _line_definition,
        lengths=((1, 1), (7, 7), (65, 65), (33, 33)),
        bad=(
            (lambda: Neighborhood((8,), 4, 5), "stride <= window"),
            (lambda: simulate_tiles((8,), 4, 2, (0,), (4,)), "q_tile must have 1 sides >= 1"),
            (lambda: end_to_end(-1.0, 2.0), "share"),
        ),
    ),
    ModuleExample(
        lambda: NeighborhoodAttention(8, 2, (3, 4), stride=(2, 4)),
        _grid,
        bad=((lambda: NeighborhoodAttention(8, 3, 3), "do not divide"),),
    ),
]
