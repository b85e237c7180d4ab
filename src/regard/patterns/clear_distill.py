"""CLEAR's distillation: what trains, and on which loss (arXiv 2412.16112, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Parts of parameter names that the authors train; text projections and norms stay.
TRAINED = ("to_q.", "to_k.", "to_v.", "to_out.", "spatial_weight")


class ClearLoss(NamedTuple):
    """`total = flow + output_weight * output + attention_weight * attention`, all scalars."""

    total: Tensor
    flow: Tensor
    output: Tensor
    attention: Tensor


def distillation_loss(
    prediction: Tensor,
    target: Tensor,
    teacher: Tensor,
    attention: Sequence[Tensor] = (),
    teacher_attention: Sequence[Tensor] = (),
    *,
    output_weight: float = 0.5,
    attention_weight: float = 0.5,
    weighting: Tensor | None = None,
) -> ClearLoss:
    """`L_flow + α L_output + β L_attention` with `α = β = 0.5` (eqs. 5 to 7).

    `L_flow` is the flow-matching error of the student's prediction, `L_output` its distance from the
    teacher's, `L_attention` the distance of attention outputs. The paper sums the last over layers,
    the authors' code takes the mean; this follows the code, so the weight does not depend on depth.

    Args:
        prediction: the student's, `(B, ...)`.
        target: `noise - image`, the velocity of the straight path, like `prediction`.
        teacher: the teacher's prediction on the same noised input.
        attention, teacher_attention: outputs of the compared attention layers, in the same order;
            the authors compare every fourth single-stream block, before its output projection.
        output_weight, attention_weight: `α` and `β`.
        weighting: factor for each example `(B,)`, by its noise level (default none).

    Returns:
        The total and its terms, computed in float32 at least. No gradient goes to the teacher.
    """
    if len(attention) != len(teacher_attention):
        raise ValueError(
            f"distillation_loss: {len(attention)} attention outputs of the student came with "
            f"{len(teacher_attention)} of the teacher"
        )

    def error(a: Tensor, b: Tensor, what: str) -> Tensor:
        if a.shape != b.shape:
            raise ValueError(
                f"distillation_loss: {what} has shape {tuple(b.shape)}, the student's is "
                f"{tuple(a.shape)}"
            )
        dtype = torch.promote_types(a.dtype, torch.float32)
        square = (a.to(dtype) - b.detach().to(dtype)).square()
        if weighting is not None:
            square = square * weighting.to(dtype).view(-1, *[1] * (square.dim() - 1))
        return square.mean()

    flow = error(prediction, target, "target")
    output = error(prediction, teacher, "teacher")
    matched = torch.zeros_like(flow)
    if attention:
        pairs = zip(attention, teacher_attention, strict=True)
        matched = torch.stack([error(a, b, "teacher_attention") for a, b in pairs]).mean()
    total = flow + output_weight * output + attention_weight * matched
    return ClearLoss(total, flow, output, matched)


def train_attention_only(model: nn.Module) -> list[nn.Parameter]:
    """Freeze all of a model but the attention weights that CLEAR trains; returns those.

    Raises:
        ValueError: no parameter has such a name.
    """
    chosen = []
    for name, parameter in model.named_parameters():
        wanted = any(part in f".{name}" for part in (f".{x}" for x in TRAINED))
        parameter.requires_grad_(wanted)
        if wanted:
            chosen.append(parameter)
    if not chosen:
        raise ValueError(f"train_attention_only: the model has no parameter named {TRAINED}")
    return chosen


@contextmanager
def attention_outputs(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what attention layers return, in the order of their calls, for the loss.

    Pass the layers to compare, the authors every fourth: `attention_outputs(layers[::4])`. Clear the
    list between steps. Nothing is detached.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
