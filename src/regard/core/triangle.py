"""Inverses of many small unit triangular matrices at once, by products alone.

``[[A, 0], [C, B]]`` has the inverse ``[[A', 0], [-B' C A', B']]``. From blocks of one number, whose
inverse is 1, each round doubles the side of the blocks whose inverses are known. A solver takes the
matrices one after the other, which for sides of 64 costs ten times as much on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_lower_inverse(x: Tensor) -> Tensor:
    """``(I + x)^-1`` of strictly lower triangular ``x`` ``(..., c, c)``; differentiable.

    What stands on and above the diagonal of ``x`` is not read.
    """
    return _Inverse.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        side = x.shape[-1]
        whole = 1 << (side - 1).bit_length()
        wider = whole - side
        system = (F.pad(x, (0, wider, 0, wider)) if wider else x).reshape(-1, whole, whole)
        inverse = torch.zeros_like(system, memory_format=torch.contiguous_format)
        inverse.diagonal(dim1=1, dim2=2).fill_(1.0)
        s = 1
        while s < whole:
            known, given = _diagonal(inverse, 2 * s), _diagonal(system, 2 * s)
            upper, lower = known[..., :s, :s], known[..., s:, s:]
            known[..., s:, :s] = -(lower @ (given[..., s:, :s] @ upper))
            s *= 2
        out = inverse[:, :side, :side].reshape(x.shape)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        # d(A^-1) = -A^-1 dA A^-1
        grad_x: Tensor = -(out.mT @ grad @ out.mT).tril(-1)
        return grad_x


def _diagonal(x: Tensor, side: int) -> Tensor:
    """The blocks on the diagonal of ``(B, c, c)``: a view ``(B, c / side, side, side)``."""
    count = x.shape[-1] // side
    blocks: Tensor = x.unflatten(2, (count, side)).unflatten(1, (count, side))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
