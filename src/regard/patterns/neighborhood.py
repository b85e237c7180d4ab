"""Neighbourhood attention as a function on grids and as a module; its pattern is `Neighborhood`.

The rule stands in :mod:`regard.patterns.neighborhood_mask`, with the papers that it comes from.
Tensors are heads-last, `(B, *grid, H, D)`, as in NATTEN.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.attend import attend
from regard.core.merge import merge

from .neighborhood_bias import NeighborhoodBias
from .neighborhood_mask import Axes, Flags, Neighborhood

__all__ = ["Neighborhood", "NeighborhoodAttention", "NeighborhoodBias", "neighborhood_attention"]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Axes,
    *,
    stride: Axes = 1,
    dilation: Axes = 1,
    causal: Flags = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    block: int | tuple[int, int] | None = None,
    backend: str = "auto",
) -> Any:
    """Softmax attention of every grid point over the window around it.

    Args:
        q: `(B, *grid, H, D)`, a grid of one to three axes.
        k, v: `(B, *grid, Hkv, D)` and `(B, *grid, Hkv, Dv)`; `Hkv` divides `H`.
        window, stride, dilation, causal: of every axis, or one for all; see `Neighborhood`.
        scale: factor on the scores, default `D ** -0.5`.
        rpb: relative position bias `(H, 2 w - 1, ...)`, added after scaling; odd windows and no
            causal axis. See `NeighborhoodBias`.
        extra_k, extra_v: `(B, M, Hkv, D)` and `(B, M, Hkv, Dv)`, seen by every query besides its
            window (arXiv 2504.16922, section 3: joined by log-sum-exp).
        dropout: probability of dropping a weight.
        generator: source of randomness for dropout.
        return_lse: also return the natural log-sum-exp of every row.
        block: tokens in a block of queries and of keys, default those of :func:`regard.attend`.
        backend: as in :func:`regard.attend`.

    Returns:
        `(B, *grid, H, Dv)`, and with `return_lse` also `(B, *grid, H)`.

    Raises:
        ValueError: shapes that do not fit, or a window that does not.
    """
    grid = tuple(q.shape[1:-2])
    for name, x in (("k", k), ("v", v)):
        if x.dim() != q.dim() or tuple(x.shape[1:-2]) != grid:
            raise ValueError(
                f"neighborhood_attention: {name} has shape {tuple(x.shape)}, expected the grid "
                f"{grid} of q, as (batch, *grid, heads, width)"
            )
    if (extra_k is None) != (extra_v is None):
        raise ValueError("neighborhood_attention: extra_k and extra_v come together")
    mask = Neighborhood(grid, window, stride, dilation, causal)
    if rpb is not None:
        NeighborhoodBias(rpb, mask)  # so that errors speak of the whole grid
    folds, mask = fold(mask)
    heads_first = [_apart(x, folds).flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    options: dict[str, Any] = {
        "scale": scale,
        "dropout": dropout,
        "generator": generator,
        "return_lse": return_lse or extra_k is not None,
        "backend": backend,
    }
    found = attend(
        *heads_first,
        mask=None if block is not None or mask.full else mask,
        layout=None if block is None else mask.layout(mask.points, block=block, device=q.device),
        bias=None if rpb is None else NeighborhoodBias(rpb, mask),
        **options,
    )
    if not options["return_lse"]:
        return _together(found.transpose(1, 2).unflatten(1, mask.grid), folds)
    out, lse = (x.transpose(1, 2).unflatten(1, mask.grid) for x in found)
    out, lse = _together(out, folds), _together(lse, folds)
    if extra_k is not None and extra_v is not None:
        rows, *extra = (x.transpose(1, 2) for x in (q.flatten(1, -3), extra_k, extra_v))
        more = attend(rows, *extra, **options)
        more_out, more_lse = (x.transpose(1, 2).unflatten(1, grid) for x in more)
        out, lse = merge([(out, lse), (more_out, more_lse)])
    return (out, lse) if return_lse else out


def fold(mask: Neighborhood) -> tuple[tuple[int, ...], Neighborhood]:
    """Residue classes as batch entries, where they are all equally long.

    A dilated axis falls apart into classes that do not see each other (arXiv 2403.04690, section 3:
    dilation as a partition). Where `δ` divides the extent, so does the grid.

    Returns:
        For every axis the number of classes to take apart, and the pattern of one class.
    """
    folds = tuple(
        d if extent % d == 0 else 1 for extent, d in zip(mask.grid, mask.steps, strict=True)
    )
    inner = replace(
        mask,
        grid=tuple(extent // f for extent, f in zip(mask.grid, folds, strict=True)),
        dilation=tuple(d // f for d, f in zip(mask.steps, folds, strict=True)),
    )
    return folds, inner


def _apart(x: Tensor, folds: tuple[int, ...]) -> Tensor:
    """`(B, *grid, ...)` as `(B * classes, *smaller grid, ...)`."""
    if math.prod(folds) == 1:
        return x
    axes = len(folds)
    for axis, f in reversed(list(enumerate(folds))):
        x = x.unflatten(axis + 1, (x.shape[axis + 1] // f, f))
    classes = [2 * axis + 2 for axis in range(axes)]
    places = [2 * axis + 1 for axis in range(axes)]
    rest = range(2 * axes + 1, x.dim())
    return x.permute(0, *classes, *places, *rest).flatten(0, axes)


def _together(x: Tensor, folds: tuple[int, ...]) -> Tensor:
    """Undo :func:`_apart`."""
    if math.prod(folds) == 1:
        return x
    axes = len(folds)
    x = x.unflatten(0, (x.shape[0] // math.prod(folds), *folds))
    order = [0]
    for axis in range(axes):
        order += [axes + 1 + axis, 1 + axis]
    x = x.permute(*order, *range(2 * axes + 1, x.dim()))
    for axis in range(axes):
        x = x.flatten(axis + 1, axis + 2)
    return x


class NeighborhoodAttention(nn.Module):
    """Multi-head neighbourhood attention on `(B, *grid, C)`.

    Parameters: `qkv` `(3 C, C)` with rows ordered q, k, v, each head by head; `proj` `(C, C)`.

    Args:
        dim: `C`.
        heads: number of heads; it divides `dim`.
        window, stride, dilation, causal: of every axis, or one for all; see `Neighborhood`.
        qkv_bias: whether `qkv` has a bias.
        attn_drop, proj_drop: dropout on the weights and on the output, in training.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Axes,
        stride: Axes = 1,
        dilation: Axes = 1,
        causal: Flags = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{type(self).__name__}: {heads} heads do not divide dim {dim}")
        self.dim, self.heads = dim, heads
        self.window, self.stride, self.dilation, self.causal = window, stride, dilation, causal
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb: Tensor | None = None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, extra_k: Tensor | None = None, extra_v: Tensor | None = None
    ) -> Tensor:
        """`(B, *grid, C)` to the same; `extra_k`, `extra_v` `(B, M, H, C / H)` as in the function."""
        if not 3 <= x.dim() <= 5 or x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, expected "
                f"(batch, one to three axes, {self.dim})"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out = neighborhood_attention(
            q,
            k,
            v,
            self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.causal,
            rpb=self.rpb,
            extra_k=extra_k,
            extra_v=extra_v,
            dropout=self.attn_drop if self.training else 0.0,
        )
        projected: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return projected

    def extra_repr(self) -> str:
        own = ("window", "stride", "dilation", "causal")
        return f"heads={self.heads}, " + ", ".join(f"{x}={getattr(self, x)}" for x in own)
