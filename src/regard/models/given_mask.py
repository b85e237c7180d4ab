"""The model's own mask and score bias of one call, in whatever form the model hands them over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.bias import DenseBias
from ..core.data_masks import Dense
from ..core.masks import Causal, Full
from .interface import MaskToken
from .own_mask import OwnMask


def given_mask(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    mask: MaskToken | Tensor | None,
    extra: dict[str, Any],
    crosses: bool = False,
) -> tuple[OwnMask, DenseBias | None]:
    """Translate what an attention function was given as its mask.

    A :class:`MaskToken` is what our mask function made. ``None`` comes from models that ask for no
    mask at all (image towers): then ``is_causal`` decides, as for PyTorch's kernel. A 4-D tensor is
    the user's own: bool ones say where a query may look, float ones are added to the scores, with
    entries below half of the dtype's range taken as "may not look". Where the keys are another
    sequence's (``crosses``), no mask hides nothing.
    """
    bias = extra.pop("position_bias", None)
    if crosses and bias is not None and not bool(bias.any()):
        bias = None  # T5 hands zeros on
    n, m = q.shape[2], k.shape[2]
    if isinstance(mask, MaskToken):
        return mask.own, None if bias is None else DenseBias(bias[..., : mask.own.keys])
    if mask is None:
        flag = extra.get("is_causal")
        causal = getattr(module, "is_causal", True) if flag is None else flag
        # as PyTorch's kernel is used there: causal from the upper left, one query sees everything
        causal = bool(causal) and n > 1 and not crosses
        keys = min(n, m) if causal else m
        own = OwnMask(Causal() if causal else Full(), None, None, 0, keys)
        return own, None if bias is None else DenseBias(bias[..., :keys])
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"patch: {type(module).__name__} was given mask {got}, expected 4-D")
    mask = mask[..., :m]
    if mask.dtype == torch.bool:
        allowed, score = mask, None
    else:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        score = mask.masked_fill(~allowed, 0)
        score = score if bool(score.any()) else None
    if score is not None:
        bias = score if bias is None else bias + score
    batch = allowed.expand(q.shape[0], *allowed.shape[1:])
    pattern = Dense(batch.expand(*batch.shape[:2], n, m))
    return OwnMask(pattern, None, None, 0, m), None if bias is None else DenseBias(bias)
