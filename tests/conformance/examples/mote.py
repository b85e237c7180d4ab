"""MoTE: routing and scores on tensors."""

from __future__ import annotations

import torch

from regard.steer.mote import TunedExperts
from regard.steer.mote_resonance import behaviour_score
from regard.steer.mote_route import route
from tests.conformance import FunctionExample


def _inputs(dtype):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 6, generator=g, dtype=torch.float64)
    maps = torch.rand(5, 3, 6, generator=g, dtype=torch.float64)
    return logits.to(dtype), maps.to(dtype)


def _dense(weights, indices):
    return weights.new_zeros(7, 6).scatter_add(1, indices, weights)


LABELS = torch.tensor([True, False, True, False, False])


def _fast(logits, maps):
    dropped, masked = (
        _dense(*route(logits, 3, off=[1, 4], on=[2], mode=mode)) for mode in ("drop", "mask")
    )
    return dropped, masked, behaviour_score(maps, LABELS, "ratio")


def _definition(logits, maps):
    found = []
    for mode in ("drop", "mask"):
        out = torch.zeros_like(logits)
        for row, new in zip(logits.tolist(), out, strict=True):
            able = [e for e in range(6) if mode == "drop" or e not in (1, 4)]
            others = sorted((e for e in able if e != 2), key=lambda e: -row[e])[:2]
            kept = [e for e in (2, *others) if e not in (1, 4)]
            new[kept] = torch.tensor([row[e] for e in kept]).to(out).softmax(0)
        found.append(out)
    a, b = (maps[0] + maps[2]) / 2, (maps[1] + maps[3] + maps[4]) / 3
    return *found, (a - b) / (a + b)


EXAMPLES = [
    FunctionExample(
        _fast,
        _definition,
        _inputs,
        bad=(
            (lambda: route(torch.ones(2, 4), 2, off=[4]), r"experts \[4\]"),
            (lambda: route(torch.ones(2, 4), 3, off=[0, 1], mode="mask"), "do not fit that"),
            (lambda: TunedExperts(mode="cut"), "mode must be one of drop, mask"),
            (lambda: behaviour_score(torch.ones(2, 1, 3), torch.tensor([True, True])), "one group"),
        ),
    ),
]
