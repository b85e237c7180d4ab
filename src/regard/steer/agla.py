"""AGLA: logits of the whole prompt and of its relevant part, added up under a plausibility cut.

An et al., "Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and
Local Attention", arXiv 2406.12718. An image-text matching model tells which parts of the image the
prompt is about; the others are masked, a second branch reads the masked image, and its logits are added
to the first one's wherever those are plausible.

Followed: Lackel/AGLA, ``eval/augmentation.py`` and ``eval/sample.py``. The relevance map of an image is
the caller's (the authors take GradCAM of BLIP's matching model, cross-attention block 6, blown up to
384 x 384); for text :func:`~regard.steer.agla_text.text_relevance` makes one with the model itself.
Logits are added, not subtracted as in contrastive decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.card import Card

from ..models.activations import Inputs
from ..models.method import Inside, Method
from .agla_branch import SecondBranch

CARD = Card(
    key="agla",
    title="AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of "
    "Global and Local Attention",
    arxiv="2406.12718",
    family="steer",
    entry="regard.steer.agla:AGLA",
    definition="tests/steer/test_agla.py::test_is_the_formula_written_out",
    oracle="python -m tests.golden tests/golden/data/agla.npz",
    claim="python -m benchmarks.agla --smollm2",
    cost="python -m benchmarks.agla --only growth",
    note="Its second branch runs the model once more a token. The text analogue (gradient times "
    "attention) is ours; on SmolLM2 alpha=0.5 helps a little, a random third as much, and alpha=1 and "
    "2 harm.",
)


def keep_most_relevant(cam: Tensor, share: float) -> Tensor:
    """The entries at or above the value at rank ``int(n share)``, so about ``share`` of them.

    Args:
        cam: relevance, any shape, ranked as a whole; ties with that value are kept.
        share: in [0, 1).

    Returns:
        bool, as ``cam``.
    """
    if not cam.numel() or not 0 <= share < 1:
        raise ValueError(
            f"keep_most_relevant: expected entries and a share in [0, 1), got {tuple(cam.shape)} and "
            f"{share}"
        )
    ranked = cam.flatten().sort(descending=True).values
    return cam >= ranked[int(cam.numel() * share)]


def relevance_mask(cam: Tensor, similarity: float) -> Tensor:
    """What stays of an image: the better it matches the prompt, the less.

    Args:
        cam: relevance of each pixel, any shape.
        similarity: image-text matching score ``s``, at most 2; the share that stays is
            ``min(1 - s / 2, 1 - 1e-5)``.

    Returns:
        bool, as ``cam``; the masked image is ``image * mask``.
    """
    if similarity > 2:
        raise ValueError(f"relevance_mask: similarity must be <= 2, got {similarity}")
    return keep_most_relevant(cam, min(1 - similarity / 2, 1 - 1e-5))


def assemble_logits(
    logits: Tensor, augmented: Tensor, alpha: float = 2.0, beta: float = 0.5
) -> Tensor:
    """``l + alpha l_aug`` where ``l >= max l + log beta``, else ``-inf``.

    Args:
        logits, augmented: ``(..., V)``, of the whole and of the masked prompt.
        alpha: weight of the second; the authors' script takes 2.
        beta: share of the first's largest probability that a token needs; 1 leaves the largest alone,
            0 cuts nothing.

    Returns:
        As ``logits``; the first's argmax is never cut.

    Raises:
        ValueError: different shapes, or ``beta`` outside [0, 1].
    """
    if logits.shape != augmented.shape:
        raise ValueError(
            f"assemble_logits: logits and augmented differ: {tuple(logits.shape)} and "
            f"{tuple(augmented.shape)}"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"assemble_logits: beta must lie in [0, 1], got {beta}")
    # Not added: 0 * -inf of a logit that the model itself forbids would be NaN.
    mixed = logits if alpha == 0 else logits + alpha * augmented
    if beta == 0:
        return mixed
    cut = logits.amax(-1, keepdim=True) + math.log(beta)
    return mixed.masked_fill(logits < cut, -torch.inf)


@dataclass(frozen=True, eq=False)
class AGLA(Method):
    """The second branch beside a running model, with a KV cache of its own.

        masked = {**inputs, "pixel_values": inputs["pixel_values"] * mask}
        with regard.patch(model, AGLA(model, masked)):
            model.generate(**inputs, do_sample=True)

    After every pass the model runs once more, on the masked prompt first and then on the tokens that
    were chosen. Logits of the prompt's last row and of all rows behind it are assembled; a loss that
    the model computes from labels is the plain one. The branch's cache rides in the model's KV cache,
    so that what is done to that (beams, drafts, crops) is done to it. The prompt is read in one pass.
    Patches that are on act on both branches; no spans are needed.

    Attributes:
        model: the model that is patched.
        masked: token ids ``(B, N')`` or keyword arguments of the masked prompt: pixels at zero, an
            ``attention_mask`` with holes, or tokens left out. A mask may have holes, padding is on the
            left. Each of the ``B`` sequences serves as many of the running ones (beams).
        alpha, beta: as for :func:`assemble_logits`.

    Raises:
        ValueError: ``beta`` outside [0, 1], or no ``input_ids``; on entering: another model; while
            running: another number of sequences, no KV cache, or one that was filled before.
    """

    model: nn.Module
    masked: Inputs
    alpha: float = 2.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"AGLA: beta must lie in [0, 1], got {self.beta}")
        if not isinstance(self.masked, Tensor) and "input_ids" not in self.masked:
            raise ValueError(f"AGLA: masked needs input_ids, got {', '.join(self.masked)}")

    def hooks(self, inside: Inside) -> Sequence[RemovableHandle]:
        """One hook at the whole model: the pass is over there, and another one may run."""
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        if inside.root not in (decoder, self.model):
            raise ValueError("AGLA: model is another one than the patched model")
        masked = {"input_ids": self.masked} if isinstance(self.masked, Tensor) else self.masked
        second = SecondBranch(inside, masked, self._assemble)
        return [self.model.register_forward_hook(second, with_kwargs=True)]

    def _assemble(self, logits: Tensor, augmented: Tensor) -> Tensor:
        return assemble_logits(logits, augmented, self.alpha, self.beta)
