"""ByteTransformer: an encoder layer on packed tokens."""

from __future__ import annotations

import torch

from regard import attend_packed
from regard.patterns.bytetransformer import PackedEncoderLayer
from tests.conformance import ModuleExample


def _inputs(dtype):
    x = torch.randn(13, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, torch.tensor([0, 5, 5, 13])


EXAMPLES = [
    ModuleExample(
        lambda: PackedEncoderLayer(16, 4),
        _inputs,
        bad=(
            (lambda: PackedEncoderLayer(16, 3), "does not divide"),
            (
                lambda: attend_packed(*torch.randn(3, 7, 2, 4), torch.tensor([0, 3, 6])),
                "cumulative lengths",
            ),
        ),
    )
]
