"""Elementwise linear recurrences: the diagonal scan, and the selective scan of state spaces."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import compute_dtype

# Numbers of one strip of a selective scan's expanded states: 16 MB in float32.
_STRIP = 1 << 22


def diagonal_scan(
    x: Tensor, log_decay: Tensor, initial: Tensor | None = None, *, return_state: bool = False
) -> Any:
    """``h_t = exp(log_decay_t) * h_{t-1} + x_t``, elementwise (HGRN, arXiv 2311.04823, Eq. 4).

    In about ``2 sqrt(T)`` steps: chunks are scanned side by side, then joined.

    Args:
        x: ``(B, T, ...)``.
        log_decay: broadcasts to ``x``.
        initial: ``h_0`` ``(B, ...)``, default zeros.
        return_state: also return the last ``h`` ``(B, ...)``.

    Returns:
        All ``h``, the shape and dtype of ``x``; computed in float32, or float64 for float64.

    Raises:
        ValueError: a shape does not fit.
    """
    if x.dim() < 2:
        raise ValueError(f"diagonal_scan: x must be (B, T, ...), got {tuple(x.shape)}")
    state_shape = x[:, :1].squeeze(1).shape if x.shape[1] else (x.shape[0], *x.shape[2:])
    if initial is not None and initial.shape != state_shape:
        raise ValueError(
            f"diagonal_scan: initial must be {tuple(state_shape)}, got {tuple(initial.shape)}"
        )
    dtype = compute_dtype(x.dtype)
    start = x.new_zeros(state_shape, dtype=dtype) if initial is None else initial.to(dtype)
    try:
        rate = log_decay.to(dtype).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"diagonal_scan: log_decay {tuple(log_decay.shape)} does not broadcast to x "
            f"{tuple(x.shape)}"
        ) from None
    out: Tensor = _Scan.apply(x.to(dtype), rate.exp(), start)  # type: ignore[no-untyped-call]
    last = out[:, -1] if x.shape[1] else start
    out = out.to(x.dtype)
    return (out, last) if return_state else out


class _Scan(torch.autograd.Function):
    """Forward in time; the gradient is the same scan backward in time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: Tensor, start: Tensor) -> Tensor:
        out = _scan(x, rate, start)
        ctx.save_for_backward(out, rate, start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, rate, start = ctx.saved_tensors
        if not out.shape[1]:
            return grad, torch.zeros_like(rate), torch.zeros_like(start)
        # h_t reaches h_{t+1} through rate_{t+1}.
        later = torch.cat([rate[:, 1:], torch.ones_like(rate[:, :1])], dim=1)
        dx = _scan(grad.flip(1), later.flip(1), torch.zeros_like(start)).flip(1)
        before = torch.cat([start[:, None], out[:, :-1]], dim=1)
        return dx, dx * before, dx[:, 0] * rate[:, 0]


def _scan(x: Tensor, rate: Tensor, start: Tensor) -> Tensor:
    length = x.shape[1]
    side = max(1, math.isqrt(length))
    whole = length // side * side
    out, h = torch.empty_like(x), start
    if whole:
        rates, found = (y[:, :whole].unflatten(1, (-1, side)) for y in (rate, out))
        kept = torch.empty_like(rates)
        # Views are made once: for short sequences making them takes longer than the arithmetic.
        added = x[:, :whole].unflatten(1, (-1, side)).unbind(2)
        factor, inside, past = rates.unbind(2), found.unbind(2), kept.unbind(2)
        inside[0].copy_(added[0])
        past[0].copy_(factor[0])
        for t in range(1, side):
            torch.addcmul(added[t], factor[t], inside[t - 1], out=inside[t])
            torch.mul(factor[t], past[t - 1], out=past[t])
        entering = torch.empty_like(inside[0])
        chunks = zip(inside[-1].unbind(1), past[-1].unbind(1), entering.unbind(1), strict=True)
        for last, through, before in chunks:
            before.copy_(h)
            h = torch.addcmul(last, through, h)
        found.addcmul_(kept, entering[:, :, None])
    for t in range(whole, length):
        h = torch.addcmul(x[:, t], rate[:, t], h)
        out[:, t] = h
    return out


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """Mamba's selective state space (arXiv 2312.00752, Alg. 2), with ``C`` channels, ``S`` states::

        h_t = exp(delta_t a) h_{t-1} + delta_t b_t u_t        y_t = c_t h_t + d u_t

    Args:
        u, delta: ``(B, C, L)``.
        a: ``(C, S)``, negative.
        b, c: ``(B, G, S, L)``; ``G`` divides ``C``, consecutive channels share a group.
        d: ``(C,)``, the skip, default none.
        delta_bias: ``(C,)``, added to ``delta`` before the softplus.
        softplus: whether ``delta`` goes through a softplus.
        state: ``(B, C, S)``, default zeros.
        return_state: also return the last state.

    Returns:
        ``y`` ``(B, C, L)`` in the dtype of ``u``.

    Raises:
        ValueError: a shape does not fit.
    """
    batch, channels, length = u.shape
    wanted = {
        "delta": (delta, (batch, channels, length)),
        "a": (a, (channels, a.shape[-1])),
        "b": (b, (batch, b.shape[1], a.shape[-1], length)),
        "c": (c, tuple(b.shape)),
        "state": (state, (batch, channels, a.shape[-1])),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"selective_scan: {name} must be {shape}, got {tuple(x.shape)}")
    if b.shape[1] == 0 or channels % b.shape[1]:
        raise ValueError(
            f"selective_scan: b has {b.shape[1]} groups, which do not divide {channels}"
        )
    dtype = compute_dtype(u.dtype)
    step = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias[:, None]
    step = F.softplus(step) if softplus else step
    share = channels // b.shape[1]
    h = u.new_zeros(batch, channels, a.shape[-1], dtype=dtype) if state is None else state.to(dtype)
    outs = []
    strip = max(1, _STRIP // max(1, batch * channels * a.shape[-1]))
    for first in range(0, length, strip):
        at = slice(first, first + strip)
        now = step[:, :, at].transpose(1, 2)[..., None]
        into = b[..., at].to(dtype).permute(0, 3, 1, 2).repeat_interleave(share, dim=2)
        read = c[..., at].to(dtype).permute(0, 3, 1, 2).repeat_interleave(share, dim=2)
        x = now * into * u[:, :, at].to(dtype).transpose(1, 2)[..., None]
        states, h = diagonal_scan(x, now * a.to(dtype), h, return_state=True)
        outs.append((states * read).sum(-1).transpose(1, 2))
    y = torch.cat(outs, dim=-1) if outs else torch.zeros_like(step)
    if d is not None:
        y = y + d.to(dtype)[:, None] * u.to(dtype)
    y = y.to(u.dtype)
    return (y, h) if return_state else y
