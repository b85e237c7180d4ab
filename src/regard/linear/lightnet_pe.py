"""LightNet's positions over any number of axes: MD-LRPE, TPE and MD-TPE (arXiv 2405.21022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import compute_dtype

from .lightning2 import lightning_attention
from .tnl_lrpe import initial_theta, lrpe, lrpe_angles


def grid_index(position: Tensor, grid: Sequence[int]) -> Tensor:
    """Coordinates `(..., m)` of places `(...)` in a grid of `m` axes, flattened row-major.

    The first axis has no end here: a stream may go on along it.
    """
    coordinates = []
    for side in reversed(grid[1:]):
        coordinates.append(position % side)
        position = position // side
    return torch.stack([position, *reversed(coordinates)], dim=-1)


def md_lrpe(x: Tensor, theta: Tensor, grid: Sequence[int], special: int = 0) -> Tensor:
    """LRPE over the axes of a grid.

    Axis `i` turns its block of `E` channels by `index_i θ_{h, j}`; the blocks are concatenated and
    cut off at `K`.

    Args:
        x: `(B, H, special + prod(grid), K)`.
        theta: `(H, E)`, with `E m >= K` for `m` axes.
        grid: sides of the grid, flattened row-major.
        special: leading tokens outside the grid, which are not turned: they become `[x, 0]`.

    Returns:
        `(B, H, special + prod(grid), 2 K)`.

    Raises:
        ValueError: the tokens do not fill the grid, or `theta` has too few channels.
    """
    return lrpe(x, _grid_angles(theta, grid, x.shape[2], x.shape[3], special))


def _grid_angles(
    theta: Tensor, grid: Sequence[int], tokens: int, width: int, special: int
) -> Tensor:
    places = math.prod(grid)
    if not grid or special < 0 or tokens != special + places:
        raise ValueError(
            f"md_lrpe: {tokens} tokens, expected {special} special ones and {places} of the grid "
            f"{tuple(grid)}"
        )
    index = grid_index(torch.arange(places, device=theta.device), grid)
    return F.pad(lrpe_angles(theta, index, width), (0, 0, special, 0))


class MDLRPE(nn.Module):
    """Learned angles of several axes.

    Args:
        heads: `H`.
        dim: `K`, channels of a head.
        axes: `m`; `theta` is `(H, ceil(K / m))`.
    """

    def __init__(self, heads: int, dim: int, axes: int) -> None:
        super().__init__()
        if min(heads, dim, axes) < 1:
            raise ValueError(
                f"MDLRPE: heads, dim and axes must be >= 1, got {heads}, {dim} and {axes}"
            )
        self.dim, self.axes = dim, axes
        self.theta = nn.Parameter(initial_theta(heads, math.ceil(dim / axes)))

    def angles(self, index: Tensor) -> Tensor:
        """Angles `(..., H, N, K)` at coordinates `(..., N, m)`."""
        if index.shape[-1] != self.axes:
            raise ValueError(f"MDLRPE: got {index.shape[-1]} coordinates, expected {self.axes}")
        return lrpe_angles(self.theta, index, self.dim)

    def forward(self, x: Tensor, grid: Sequence[int], special: int = 0) -> Tensor:
        """As :func:`md_lrpe`."""
        if len(grid) != self.axes:
            raise ValueError(f"MDLRPE: grid {tuple(grid)} has {len(grid)} axes, not {self.axes}")
        return md_lrpe(x, self.theta, grid, special)


class TPE(nn.Module):
    """Toeplitz position encoding: an exponential filter a head, along one axis.

    `y = W_o RMS(sum_{s <= t} λ_h^{t - s} (q_h · k_h) x_s)`, with learned vectors `q` and `k` and
    `λ = sigmoid(log_decay)`; Doraemonzzz/xmixers, `pes/tpe.py`.

    Args:
        dim: channels in and out.
        heads: divides `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"TPE: heads must divide dim {dim}, got {heads}")
        self.heads = heads
        self.q = nn.Parameter(torch.randn(dim))
        self.k = nn.Parameter(torch.randn(dim))
        self.log_decay = nn.Parameter(torch.randn(heads))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """`(B, N, C)` to `(B, N, C)`.

        Args:
            x: `(B, N, C)`.
            state: `(B, H, 1, C / H)`, the filtered tokens before, default zeros.
            mask: `(B, N)` bool, True for tokens; padding is skipped.
            return_state: also return the state.
        """
        wide = compute_dtype(x.dtype)
        values = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k = (vector.to(wide).unflatten(0, (self.heads, -1)) for vector in (self.q, self.k))
        shape = (*values.shape[:3], 1)
        out, state = lightning_attention(
            (q * k).sum(-1)[:, None, None].to(x.dtype).expand(shape),
            x.new_ones(shape),
            values,
            -F.logsigmoid(self.log_decay.to(wide)),
            mask=mask,
            state=state,
            return_state=True,
        )
        out = self.o_proj(self.norm(out.transpose(1, 2).flatten(2)))
        return (out, state) if return_state else out


class MDTPE(nn.Module):
    """A :class:`TPE` along every axis of a grid, summed.

    Args:
        dim, heads: as for :class:`TPE`.
        axes: of the grid.
    """

    def __init__(self, dim: int, heads: int, axes: int) -> None:
        super().__init__()
        if axes < 1:
            raise ValueError(f"MDTPE: axes must be >= 1, got {axes}")
        self.tpes = nn.ModuleList(TPE(dim, heads) for _ in range(axes))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """`(B, N, C)` on a grid of `N` places, flattened row-major, to `(B, N, C)`."""
        if len(grid) != len(self.tpes) or math.prod(grid) != x.shape[1]:
            raise ValueError(
                f"MDTPE: got the grid {tuple(grid)} for {x.shape[1]} tokens, expected "
                f"{len(self.tpes)} axes and as many places"
            )
        spread = x.unflatten(1, tuple(grid))
        total = torch.zeros_like(x)
        for axis, tpe in enumerate(self.tpes, 1):
            rows = spread.movedim(axis, -2)
            filtered = tpe(rows.reshape(-1, *rows.shape[-2:])).reshape(rows.shape)
            total = total + filtered.movedim(-2, axis).flatten(1, -2)
        return total
