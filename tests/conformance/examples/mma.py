"""Modality-mutual attention: its mask, and the method on models."""

from __future__ import annotations

import torch

import regard
from regard import Causal, Rectangles
from regard.models import Spans
from regard.steer.mma import ModalityMutual, mutual_mask
from tests.conformance import MaskExample, ModelExample


def _mask(n, m):
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
    image = ((i >= 2) & (i < 9)) | ((i >= 12) & (i < 17))
    return (j <= i) | (image & (j >= 20) & (j < 31))


def _on_model(model, ids):
    spans = Spans.of(image=[(2, 4), (5, 7)], text=(8, 11))
    with regard.patch(model, ModalityMutual(), spans=spans):
        long = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        return [model(ids).logits, model.generate(ids, **long)]


EXAMPLES = [
    MaskExample(Causal() | Rectangles(((2, 9), (12, 17)), ((20, 31),)), 33, 35, _mask),
    ModelExample(
        _on_model,
        bad=((lambda: mutual_mask(4, (0, 5), (1, 2)), "does not lie inside 4 tokens"),),
    ),
]
