"""Modality-mutual attention: the rows of an image also see the question that follows it.

"Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs"
(AKI), arXiv 2503.02597. With causal attention an image that stands before its question is read without
knowing what is asked. The mask lets rows of the image see the question; text rows stay causal, and the
answer is hidden from the image.

Followed: sony/aki, ``codes/open_flamingo/src/vlm.py``. There one image a sequence; here all ranges of
the image's span see the same text. A model is trained with the mask; text can then leak: what a later
token of the question says reaches earlier rows of the question through the image, from the second layer
on. Leave the question out of the loss. In a second turn the image's keys still know the first question
only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.card import Card

from ..core.masks import Causal, Mask, Shifted
from ..core.rectangle_mask import Rectangles
from ..models.calls import AttentionCall
from ..models.method import Method
from ..models.spans import Range

CARD = Card(
    key="mma",
    title="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for "
    "Multimodal LLMs",
    arxiv="2503.02597",
    family="steer",
    entry="regard.steer.mma:ModalityMutual",
    definition="tests/steer/test_mma.py::test_is_the_mask_written_out",
    oracle="python -m tests.golden tests/golden/data/mma.npz",
    claim="python -m benchmarks.mma --train",
    cost="python -m benchmarks.mma --only growth",
    note="The claim is shown on a toy task; on models that were not trained with it the mask only "
    "changes what the image's rows read.",
)


def mutual_mask(n: int, image: Range, text: Range, padding: Tensor | None = None) -> Tensor:
    """Which pairs may attend: causal, or a row of the image and a key of the text.

    Args:
        n: length of the sequence.
        image, text: half-open ranges.
        padding: ``(N,)`` or ``(B, N)``, nonzero where a key is real.

    Returns:
        bool ``(N, N)``, or ``(B, N, N)`` for padding of a batch.

    Raises:
        ValueError: a range does not lie inside the sequence, or padding of another length.
    """
    for name, (a, z) in (("image", image), ("text", text)):
        if not 0 <= a <= z <= n:
            raise ValueError(f"mutual_mask: {name} ({a}, {z}) does not lie inside {n} tokens")
    allow = (Causal() | Rectangles((image,), (text,))).dense(n)
    if padding is None:
        return allow
    if padding.shape[-1] != n:
        raise ValueError(f"mutual_mask: padding covers {padding.shape[-1]} keys, expected {n}")
    return allow & (padding != 0)[..., None, :]


@dataclass(frozen=True)
class ModalityMutual(Method):
    """Modality-mutual attention in a running model, for prefill and for training.

        with regard.patch(model, ModalityMutual(), spans=Spans.of(image=(35, 611), text=(611, 640))):
            model.generate(**inputs)

    Rows of the image read the question too; all other rows, generated ones among them, stay as they
    are, so that decoding over the cache is what one pass computes. The image and the question must
    be read in one pass. An empty question changes nothing.

    Attributes:
        image, text: names of the spans; the text ends where the answer starts.

    Raises:
        ValueError: while running: a span is missing, or a pass holds the image but not the question.
    """

    image: str = "image"
    text: str = "text"

    def mask(self, pattern: Mask, call: AttentionCall) -> Mask:
        """The model's pattern, or a row of the image and a key of the question."""
        spans = call.spans
        if spans is None:
            raise ValueError(
                f"ModalityMutual: no spans {self.image!r} and {self.text!r}; give patch(..., "
                f"spans=Spans.of({self.image}=(a, b), {self.text}=(b, c)))"
            )
        text_end = spans.end(self.text)
        spans.end(self.image)
        image = tuple(r for r in spans.ranges[self.image] if r[1] > r[0])
        text = tuple(r for r in spans.ranges[self.text] if r[1] > r[0])
        past, stop = call.passing.past, call.passing.past + call.passing.n
        if not image or not text or all(z <= past for _, z in image):
            return pattern
        if any(a < stop for a, _ in image) and stop < text_end:
            raise ValueError(
                f"ModalityMutual: this pass ends at column {stop}, the question at {text_end}; the "
                "image reads the question, so read both in one pass"
            )
        mutual: Mask = Rectangles(image, text)
        return pattern | (Shifted(mutual, call.own.offset) if call.own.offset else mutual)
