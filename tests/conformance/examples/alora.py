"""ALoRA: the layer, and adapters in models."""

from __future__ import annotations

import torch
from torch import nn

import regard
from regard.steer.alora import ALoRA, ALoRALinear
from regard.steer.alora_model import ALoRAAdapters
from tests.conformance import ModelExample, ModuleExample
from tests.models.tiny import make


def _make():
    layer = ALoRALinear(nn.Linear(6, 10), r=4, heads=2)
    nn.init.normal_(layer.B.weight)
    layer.base.requires_grad_(True)  # the suite wants every gradient
    return layer


def _inputs(dtype):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(2, 9, 6, generator=g, dtype=torch.float64).to(dtype),)


def _on_model(model, ids):
    torch.manual_seed(0)
    targets = ("q_proj", "v_proj") if model.config.model_type == "llama" else ("query_key_value",)
    method = ALoRAAdapters.of(model, targets=targets, r=4)
    for adapter in method.adapters:
        nn.init.normal_(adapter.B.weight)
    with torch.no_grad(), regard.patch(model, method):
        found = [model(ids).logits]
        found.append(model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False))
    return found


def _neutral():
    """New adapters of the tiny Llama's queries and values: B is zero."""
    wide, narrow = ALoRA(32, 32, r=4), ALoRA(32, 16, r=4)
    return ALoRAAdapters({"0.q_proj": wide, "3.v_proj": narrow})


EXAMPLES = [
    ModuleExample(
        _make,
        _inputs,
        causal=True,
        bad=(
            (
                lambda: ALoRALinear(nn.Linear(4, 4), r=6, heads=4),
                "heads 4 must divide the rank r=6",
            ),
            (lambda: ALoRALinear(nn.Linear(4, 4))(torch.ones(3, 4)), r"x must be \(B, N, C\)"),
        ),
    ),
    ModelExample(
        _on_model,
        bad=((lambda: ALoRAAdapters.of(make("gpt_neox")), "no linear layer 'q_proj'"),),
    ),
    ModelExample(
        _on_model,
        neutral=_neutral,
        kinds=("llama",),
        bad=((lambda: ALoRAAdapters({"q_proj": ALoRA(4, 4)}), "keys must be 'layer.target'"),),
    ),
]
