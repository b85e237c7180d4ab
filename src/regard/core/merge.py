"""Join partial attention results by their log-sum-exp.

If the keys of a row are split into any disjoint parts, the attention over all of them is
`Σ_p w_p out_p` with `w = softmax_p(lse_p)`, and its log-sum-exp is `logsumexp_p lse_p`
(the identity behind FlashAttention's online softmax, arXiv 2205.14135, section 3.1). Sinks beside a
window, sampled keys, pooled keys and ring attention are all partitions joined this way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge"]

_EMPTY = float("-inf")


def merge(
    parts: Sequence[tuple[Tensor, Tensor]],
    log_weights: Sequence[Tensor | float | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of the parts' keys.

    Args:
        parts: any number of `(out, lse)`; `out` is `(..., N, Dv)`, `lse` is `(..., N)`, the natural
            log of the row's sum of exponentials. `lse = -inf` says that the part holds no key for
            that row: it contributes nothing, whatever its `out` holds.
        log_weights: for each part a number or a tensor broadcastable to its `lse`, or None for 0.
            A part with log-weight `c` counts as if each of its keys were there `exp(c)` times;
            `-inf` leaves it out.

    Returns:
        `(out, lse)`: `out` in the common dtype of the parts' outputs, `lse` in float32, or float64
        if any part is. Rows without a key in any part are 0 and `-inf`. The result does not depend
        on how the parts are grouped, up to rounding; gradients are finite for empty parts too.

    Raises:
        ValueError: no parts, shapes that do not fit, or not one log-weight a part.
    """
    if not parts:
        raise ValueError("merge: parts is empty, expected at least one (out, lse)")
    outs = [out for out, _ in parts]
    lses = [lse for _, lse in parts]
    for p, (out, lse) in enumerate(parts):
        if out.shape[:-1] != lse.shape or out.shape != outs[0].shape:
            raise ValueError(
                f"merge: part {p} has out {tuple(out.shape)} and lse {tuple(lse.shape)}, expected "
                f"out {tuple(outs[0].shape)} and lse {tuple(outs[0].shape[:-1])}"
            )
    if log_weights is not None and len(log_weights) != len(parts):
        raise ValueError(
            f"merge: {len(log_weights)} log_weights came for {len(parts)} parts, "
            "expected one for each"
        )

    out_dtype, work_dtype = outs[0].dtype, torch.float32
    for t in (*outs, *lses):
        work_dtype = torch.promote_types(work_dtype, t.dtype)
    for out in outs:
        out_dtype = torch.promote_types(out_dtype, out.dtype)

    weighted = []
    for p, lse in enumerate(lses):
        lse = lse.to(work_dtype)
        extra = None if log_weights is None else log_weights[p]
        weighted.append(lse if extra is None else _shifted(lse, extra, p))
    level = torch.stack(weighted)
    # The maximum is a mere shift, so no gradient goes through it; rows without keys shift by 0,
    # because (-inf) - (-inf) would be NaN.
    top = level.detach().amax(0)
    top = torch.where(top == _EMPTY, torch.zeros_like(top), top)
    share = torch.exp(level - top)
    total = share.sum(0)
    empty = total == 0
    total = torch.where(empty, torch.ones_like(total), total)
    share = share / total

    merged = torch.zeros_like(outs[0], dtype=work_dtype)
    for weight, one, out in zip(share, level, outs, strict=True):
        # A kernel may leave NaN in a row without keys; 0 * NaN would spread it.
        held = out.to(work_dtype).masked_fill((one == _EMPTY).unsqueeze(-1), 0.0)
        merged = merged + weight.unsqueeze(-1) * held
    lse = (top + torch.log(total)).masked_fill(empty, _EMPTY)
    return merged.to(out_dtype), lse


def _shifted(lse: Tensor, extra: Tensor | float, part: int) -> Tensor:
    weight = torch.as_tensor(extra, dtype=lse.dtype, device=lse.device)
    try:
        weight = weight.expand(lse.shape)
    except RuntimeError as error:
        raise ValueError(
            f"merge: log_weights[{part}] has shape {tuple(weight.shape)}, expected one that "
            f"broadcasts to lse's {tuple(lse.shape)}"
        ) from error
    return lse + weight
