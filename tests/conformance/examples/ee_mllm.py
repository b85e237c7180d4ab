"""EE-MLLM: its mask, the layer, and the method on models."""

from __future__ import annotations

import torch

import regard
from regard import Causal
from regard.models import Spans
from regard.steer.ee_mllm import (
    EEMLLM,
    CompositeAttention,
    composite_attention,
    composite_mask,
    image_alone,
)
from tests.conformance import FunctionExample, MaskExample, ModelExample, ModuleExample


def _mask(n, m):
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
    image = (i >= 3) & (i < 17)
    return torch.where(image, i == j, j <= i)


def _inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 12, 6, generator=generator).to(dtype) for _ in range(3))


def _definition(q, k, v):
    allow = torch.ones(12, 12).tril().bool()
    allow[3:8] = torch.eye(12)[3:8].bool()
    return (q @ k.mT / 6**0.5).masked_fill(~allow, -torch.inf).softmax(-1) @ v


def _on_model(model, ids):
    found = []
    for update in ("self", "none"):
        with regard.patch(model, EEMLLM(update), spans=Spans.of(image=[(2, 5), (7, 9)])):
            long = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
            found += [model(ids).logits, model.generate(ids, **long)]
    return found


class _Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = CompositeAttention(16, 4, 2)

    def forward(self, x):
        return self.attention(x, [(2, 6)])


EXAMPLES = [
    MaskExample(Causal() & image_alone(((3, 17),)), 21, 24, _mask, causal=True),
    FunctionExample(
        lambda q, k, v: composite_attention(q, k, v, [(3, 8)]),
        _definition,
        _inputs,
        bad=((lambda: composite_mask(4, (3, 5)), "does not lie inside"),),
    ),
    ModuleExample(
        _Layer,
        lambda dtype: (_inputs(dtype)[0][:, :, :, :4].transpose(1, 2).flatten(2),),
        causal=True,
        bad=((lambda: CompositeAttention(9, 2), "expected multiples"),),
    ),
    ModelExample(_on_model, bad=((lambda: EEMLLM("some"), "update must be one of"),)),
]
