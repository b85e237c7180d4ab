"""The dimensions in which a model's sink tokens have their massive activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.activations import Inputs, capture
from .var import default_tau


def find_massive_dims(
    model: nn.Module, inputs: Inputs, *, tau: float | None = None, share: float = 0.5
) -> tuple[int, ...]:
    """Dimensions of the residual stream that are massive in some token of a text.

    Args:
        model: a transformers decoder.
        inputs: token ids ``(B, N)`` or keyword arguments of the model; any text of some length.
        tau: a dimension is massive where ``max_tokens |h_d| / rms(h)`` exceeds it; default as for
            :class:`VAR`.
        share: of the layers' inputs, from layer 2 on, in which it must be massive.

    Returns:
        The dimensions, strongest first.

    Raises:
        ValueError: there are none; the message tells the largest value.
    """
    return massive_dims(massive_values(model, inputs), tau=tau, share=share)


def massive_dims(peaks: Tensor, *, tau: float | None = None, share: float = 0.5) -> tuple[int, ...]:
    """The dimensions of :func:`find_massive_dims`, from the values of :func:`massive_values`."""
    if not 0 < share <= 1:
        raise ValueError(f"find_massive_dims: share must lie in (0, 1], got {share}")
    tau = default_tau(peaks.shape[1], tau)
    often = (peaks > tau).double().mean(0) >= share
    strength = peaks.mean(0)
    if not bool(often.any()):
        raise ValueError(
            f"find_massive_dims: no dimension exceeds tau={tau:.3g} in {share:.0%} of the layers; the "
            f"largest value is {float(peaks.max()):.3g} in dimension {int(peaks.amax(0).argmax())}"
        )
    order = torch.argsort(strength, descending=True, stable=True)
    return tuple(d for d in order.tolist() if often[d])


def massive_values(model: nn.Module, inputs: Inputs) -> Tensor:
    """``max_tokens |h_d| / rms(h)`` of the inputs of layers 2, 3, ..., ``(L - 2, C)``."""
    found = capture(model, inputs, "resid")
    peaks = []
    for layer in sorted(layer for _, layer in found)[1:-1]:
        hidden = found["resid", layer].float().flatten(0, 1)
        scale = hidden.square().mean(-1, keepdim=True).sqrt()
        peaks.append((hidden.abs() / scale.clamp(min=1e-12)).amax(0))
    if not peaks:
        raise ValueError("find_massive_dims: the model needs at least three layers")
    return torch.stack(peaks)
