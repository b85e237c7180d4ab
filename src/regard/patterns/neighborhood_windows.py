"""Unfused neighbourhood attention: the scores of every window, and the read-out with them.

Memory is `N Π w` numbers a head, forward and backward: keys are read one offset of the window at a
time (arXiv 2403.04690, section 3.2 has the same pair as GEMMs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .neighborhood_bias import NeighborhoodBias
from .neighborhood_mask import Axes, Flags, Neighborhood, interval


def neighbours(mask: Neighborhood) -> tuple[Tensor, Tensor]:
    """The keys of every token.

    Returns:
        Row-major index of each key, int64 `(N, Π w)`, windows row by row; and bool `(N, Π w)`, False
        for the places of a causal window that has fewer keys.
    """
    index = torch.zeros(1, 1, dtype=torch.int64)
    valid = torch.ones(1, 1, dtype=torch.bool)
    for extent, w, s, d, causal in mask.rules:
        g, _, lo, hi = _axis(extent, w, s, d, causal)
        t = lo[:, None] + torch.arange(w)
        ok = t < hi[:, None]
        at = torch.where(ok, t * d + g[:, None], 0)
        index = index[:, None, :, None] * extent + at[None, :, None, :]
        valid = valid[:, None, :, None] & ok[None, :, None, :]
        index, valid = (y.flatten(2).flatten(0, 1) for y in (index, valid))
    return index, valid


def bias_entries(mask: Neighborhood) -> Tensor:
    """Where the relative bias of every key stands in a head's flattened table, `(N, Π w)`."""
    entry = torch.zeros(1, 1, dtype=torch.int64)
    for extent, w, s, d, causal in mask.rules:
        _, p, lo, _ = _axis(extent, w, s, d, causal)
        at = (lo - p)[:, None] + torch.arange(w) + w - 1
        entry = entry[:, None, :, None] * (2 * w - 1) + at[None, :, None, :]
        entry = entry.flatten(2).flatten(0, 1)
    return entry


def _axis(
    extent: int, w: int, s: int, d: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residue class, place in it, and interval of places of every position of an axis."""
    x = torch.arange(extent)
    g, p = x % d, torch.div(x, d, rounding_mode="floor")
    length = torch.div(extent - g + d - 1, d, rounding_mode="floor")
    return g, p, *interval(p, length, w, s, causal)


class _Scores(torch.autograd.Function):
    """`s[n, o] = q[n] · k[index[n, o]]`, an offset at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, index)
        return torch.stack([(q * k[:, :, at]).sum(-1) for at in index.unbind(1)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, index = ctx.saved_tensors
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for one, at in zip(grad.unbind(-1), index.unbind(1), strict=True):
            dq += one[..., None] * k[:, :, at]
            dk.index_add_(2, at, one[..., None] * q)
        return dq, dk, None


class _Read(torch.autograd.Function):
    """`out[n] = Σ_o a[n, o] v[index[n, o]]`, an offset at a time."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v, index)
        out = torch.zeros_like(v)
        for one, at in zip(weights.unbind(-1), index.unbind(1), strict=True):
            out += one[..., None] * v[:, :, at]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, v, index = ctx.saved_tensors
        dv = torch.zeros_like(v)
        for one, at in zip(weights.unbind(-1), index.unbind(1), strict=True):
            dv.index_add_(2, at, one[..., None] * grad)
        dw = torch.stack([(grad * v[:, :, at]).sum(-1) for at in index.unbind(1)], -1)
        return dw, dv, None


def na_qk(
    q: Tensor,
    k: Tensor,
    window: Axes,
    dilation: Axes = 1,
    causal: Flags = False,
    *,
    stride: Axes = 1,
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> Tensor:
    """Scores of every query with the keys of its window.

    Args:
        q, k: `(B, *grid, H or Hkv, D)`.
        window, dilation, causal, stride: as in `Neighborhood`.
        scale: factor, default `D ** -0.5`.
        rpb: relative bias `(H, 2 w - 1, ...)`, added after scaling; see `NeighborhoodBias`.

    Returns:
        `(B, H, *grid, Π w)`, keys of a window row by row, -inf where a causal window ends early.
    """
    grid = tuple(q.shape[1:-2])
    if tuple(k.shape[1:-2]) != grid or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"na_qk: k has shape {tuple(k.shape)}, expected the grid {grid} of q and a number of "
            f"heads that divides {q.shape[-2]}"
        )
    mask = Neighborhood(grid, window, stride, dilation, causal)
    index, valid = (x.to(q.device) for x in neighbours(mask))
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
    rows, cols = (x.flatten(1, -3).transpose(1, 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores: Tensor = _Scores.apply(rows * scale, cols, index)  # type: ignore[no-untyped-call]
    if rpb is not None:
        NeighborhoodBias(rpb, mask)
        scores = scores + rpb.flatten(1)[:, bias_entries(mask).to(q.device)]
    return scores.masked_fill(~valid, float("-inf")).unflatten(2, grid)


def na_av(
    weights: Tensor,
    v: Tensor,
    window: Axes,
    dilation: Axes = 1,
    causal: Flags = False,
    *,
    stride: Axes = 1,
) -> Tensor:
    """Read the values of every window with given weights.

    Args:
        weights: `(B, H, *grid, Π w)`, from the softmax of :func:`na_qk`.
        v: `(B, *grid, Hkv, Dv)`.
        window, dilation, causal, stride: those of the scores.

    Returns:
        `(B, *grid, H, Dv)`.
    """
    grid = tuple(v.shape[1:-2])
    mask = Neighborhood(grid, window, stride, dilation, causal)
    if tuple(weights.shape[2:]) != (*grid, mask.keys) or weights.shape[1] % v.shape[-2]:
        raise ValueError(
            f"na_av: weights have shape {tuple(weights.shape)}, expected (batch, heads, "
            f"{', '.join(map(str, grid))}, {mask.keys}) with heads a multiple of {v.shape[-2]}"
        )
    index, valid = (x.to(v.device) for x in neighbours(mask))
    values = v.repeat_interleave(weights.shape[1] // v.shape[-2], -2)
    values = values.flatten(1, -3).transpose(1, 2)
    held = weights.flatten(2, -2).masked_fill(~valid, 0.0)
    out: Tensor = _Read.apply(held, values, index)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).unflatten(1, grid)
