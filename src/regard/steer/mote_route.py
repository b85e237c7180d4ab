"""MoTE's routing: the softmax choice of a router's experts, with some switched off or on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Mode: TypeAlias = Literal["drop", "mask"]


def route(
    logits: Tensor,
    top_k: int,
    *,
    off: Collection[int] = (),
    on: Collection[int] = (),
    mode: Mode = "drop",
    norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax routing with experts switched off and on.

    Args:
        logits: ``(T, E)``.
        top_k: experts a token.
        off: experts switched off. ``"drop"``: their weight is 0 after the choice, nobody replaces them
            (a token all of whose experts are off gets 0 from this block); ``"mask"``: their logit is
            ``-inf`` before it, so that others fill in.
        on: experts that are always chosen, instead of the lowest, with the weight of their own logit.
        mode: see ``off``.
        norm: whether the model makes the chosen experts' weights sum to 1.

    Returns:
        weights and indices ``(T, top_k)``.

    Raises:
        ValueError: an unknown mode or expert, one both on and off, or fewer than ``top_k`` left.
    """
    count = logits.shape[-1]
    if mode not in get_args(Mode):
        raise ValueError(f"route: mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    wrong = [e for e in (*off, *on) if not 0 <= e < count]
    both = sorted(set(off) & set(on))
    if wrong or both:
        raise ValueError(
            f"route: experts {wrong or both} are not among {count}, or both on and off"
        )
    if len(set(on)) > top_k or (mode == "mask" and count - len(set(off)) < top_k):
        raise ValueError(
            f"route: {top_k} of {count} experts are chosen; {len(set(on))} on and {len(set(off))} off "
            "do not fit that"
        )
    dark, lit = (_flags(chosen, logits) for chosen in (off, on))
    if mode == "mask":
        logits = logits.masked_fill(dark, -torch.inf)
    shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # Above every share: a forced expert comes first, the chosen ones' order means nothing.
    indices = (shares + 2.0 * lit).topk(top_k, -1).indices if on else shares.topk(top_k, -1).indices
    weights = shares.gather(-1, indices)
    if mode == "drop":
        weights = weights.masked_fill(dark[indices], 0.0)
    if norm:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    return weights.to(logits.dtype), indices


def _flags(experts: Collection[int], logits: Tensor) -> Tensor:
    flags = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    flags[list(experts)] = True
    return flags
