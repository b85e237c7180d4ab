"""AGLA: assembled logits and masks on tensors, and the second branch on models."""

from __future__ import annotations

import math

import torch

import regard
from regard.models import Spans
from regard.steer.agla import AGLA, assemble_logits, keep_most_relevant, relevance_mask
from regard.steer.agla_text import mask_context, text_relevance
from tests.conformance import FunctionExample, ModelExample
from tests.models.tiny import make


def _inputs(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 20), (2, 3, 20), (5, 7))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)


def _definition(logits, augmented, cam):
    plausible = logits.softmax(-1) >= 0.3 * logits.softmax(-1).amax(-1, keepdim=True)
    out = torch.where(plausible, logits + 1.5 * augmented, -math.inf)
    order = cam.flatten().tolist()
    kept = [sum(other > x for other in order) <= int(35 * 0.65) for x in order]
    return out, torch.tensor(kept).reshape(5, 7)


def _on_model(model, ids):
    spans = Spans.of(13, image=(2, 8), text=(9, 13))
    relevance = text_relevance(model, ids, spans)
    masked = {"input_ids": ids, "attention_mask": mask_context(ids, relevance, spans, 0.5)}
    long = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with regard.patch(model, AGLA(model, masked)):
        return [relevance, model.generate(ids, **long)]


EXAMPLES = [
    FunctionExample(
        lambda a, b, cam: (assemble_logits(a, b, 1.5, 0.3), relevance_mask(cam, 0.7)),
        _definition,
        _inputs,
        bad=(
            (lambda: assemble_logits(torch.ones(3), torch.ones(4)), "logits and augmented differ"),
            (lambda: keep_most_relevant(torch.ones(3), 1.0), r"a share in \[0, 1\)"),
            (lambda: relevance_mask(torch.ones(3), 2.5), "similarity must be <= 2"),
        ),
    ),
    ModelExample(
        _on_model,
        bad=((lambda: AGLA(make("llama"), torch.ones(1, 3).long(), beta=2.0), "beta must lie"),),
    ),
]
