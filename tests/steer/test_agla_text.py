"""What of a text is relevant to a question, against differences, and the mask made of it."""

from __future__ import annotations

import pytest
import torch
from tests.models.tiny import ids, make

import regard
from regard.models import Spans, capture
from regard.steer.agla_text import mask_context, text_relevance

SPANS = Spans.of(14, image=(2, 9), text=(10, 14))


class _Edits(regard.models.Method):
    def __init__(self, *edits):
        self._edits = edits

    def edits(self):
        return self._edits


@torch.no_grad()
def _slopes(model, x, layer, weights, step=1e-5):
    """The same by differences: every weight of the question's rows moved on its own."""
    total = torch.zeros(2, 7, dtype=torch.float64)
    for head in range(4):
        for row in range(12, 14):
            for key in range(2, 9):
                ends = []
                for sign in (1, -1):

                    def nudge(w, site, row=row, key=key, sign=sign):
                        w = w.clone()
                        w[:, 0, row, key] += sign * step
                        return w

                    edit = regard.models.Edit("weights", nudge, layers=[layer], heads=[head])
                    with regard.patch(model, _Edits(edit)):
                        told = model(x).logits[:, 11:13].log_softmax(-1)
                    ends.append(told.gather(-1, x[:, 12:14, None]).sum((1, 2)))
                slope = (ends[0] - ends[1]) / (2 * step)
                total[:, key - 2] += slope.clamp(min=0) * weights[:, head, row, key] / 4
    return total


def test_relevance_is_gradient_times_attention():
    # GPT-NeoX alone: Llama's norms run in float32, too coarse for differences.
    model, x = make("gpt_neox").double(), ids(2, 14)
    spans = Spans.of(14, image=(2, 9), text=(12, 14))
    found = text_relevance(model, x, spans, layers=[2])
    assert found.shape == (2, 7) and (found >= 0).all() and found.any()
    assert all(p.grad is None for p in model.parameters())
    weights = capture(model, x, "weights", layers=[2])
    total = _slopes(model, x, 2, weights["weights", 2])
    torch.testing.assert_close(found, total / 2, rtol=1e-4, atol=1e-7)


def test_mask_hides_the_rest_of_the_context():
    x = ids(2, 14)
    relevance = torch.stack([torch.arange(7.0), torch.arange(7.0).flip(0)])
    mask = mask_context(x, relevance, SPANS, 1 / 3)
    assert mask[:, :2].all() and mask[:, 9:].all()
    assert mask[:, 2:9].tolist() == [[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mask_context(ids(1, 14), torch.ones(1, 3), SPANS, 0.3), r"must be \(1, 7\)"),
        (
            lambda: text_relevance(
                make("llama"), ids(1, 8), Spans.of(8, image=(4, 8), text=(0, 4))
            ),
            "must stand before",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
