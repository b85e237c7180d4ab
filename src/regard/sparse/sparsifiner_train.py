"""Training of Sparsifiner (arXiv 2303.13755, section 3.4, and the authors' src/losses.py).

The choice of keys passes no gradient, so a predictor learns by itself first: for a few epochs its
signed scores are fitted to the rows of the attention, everything else frozen. Then the predictors are
frozen, and the transformer is fine-tuned under sparse attention with a dense teacher beside it. The
authors: 5 epochs of the first at rates 3e-4 to 2e-4, 45 of the second at 8e-5 to 2e-6, from a trained
DeiT, which is the teacher as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparsifiner_model import Output

__all__ = ["distillation_loss", "reconstruction_loss"]


def reconstruction_loss(
    scores: Sequence[Tensor], attentions: Sequence[Tensor], weight: float = 0.01
) -> Tensor:
    """`weight` times the squared error of the scores, summed within layers and averaged over them.

    Args:
        scores: of each layer, signed, `(B, H, N - 1, N)`.
        attentions: the teacher's weights of each layer, `(B, H, N, N)`; the class token's row is left
            out, and no gradient passes.
        weight: the authors' 0.01.

    Raises:
        ValueError: not as many layers of one as of the other, or none.
    """
    if len(scores) != len(attentions) or not scores:
        raise ValueError(
            f"reconstruction_loss: got scores of {len(scores)} layers and attentions of "
            f"{len(attentions)}, expected as many, and at least one"
        )
    errors = [
        F.mse_loss(score, attention[..., 1:, :].detach(), reduction="sum")
        for score, attention in zip(scores, attentions, strict=True)
    ]
    return weight * torch.stack(errors).mean()


def distillation_loss(
    student: Output,
    teacher: Output,
    labels: Tensor,
    *,
    label_weight: float = 1.0,
    logit_weight: float = 0.5,
    token_weight: float = 0.5,
) -> Tensor:
    """The second phase: labels, the teacher's classes (KL), and the teacher's tokens (squared error).

    Args:
        student: of sparse attention.
        teacher: of dense attention, no gradient passes.
        labels: int64 `(B,)`.
        label_weight, logit_weight, token_weight: the authors' 1.0, 0.5 and 0.5. Squared errors are
            means over all numbers, the divergence is a mean over images.
    """
    kl = F.kl_div(
        F.log_softmax(student.logits, dim=-1),
        F.log_softmax(teacher.logits.detach(), dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    tokens = F.mse_loss(student.tokens, teacher.tokens.detach())
    labelled = F.cross_entropy(student.logits, labels)
    return label_weight * labelled + logit_weight * kl + token_weight * tokens
