"""LRPE: relative positions of linear attention as cosines and sines of learned angles.

Qin et al., "Linearized Relative Positional Encoding", TMLR 2023, in the form of TransNormerLLM
(arXiv 2307.14995, Eq. 6; 2405.17381). The real part of `q_t^T k_s e^{iθ(t - s)}` is

    [q cos θt, q sin θt] · [k cos θs, k sin θs]

so that the width doubles. Over several axes (LightNet's MD-LRPE, arXiv 2405.21022) every axis turns
its own block of channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.core.call import compute_dtype


def lrpe_angles(theta: Tensor, index: Tensor, width: int) -> Tensor:
    """Angles of every token, head and channel.

    Args:
        theta: `(H, E)`, with `E m >= width` for `m` axes.
        index: coordinates of the tokens `(..., N, m)`.
        width: `K`, channels of a head; the blocks of the axes are cut off there.

    Returns:
        `(..., H, N, K)`, float32 (float64 for float64 `theta`).

    Raises:
        ValueError: `theta` has too few channels.
    """
    axes = index.shape[-1]
    if theta.dim() != 2 or theta.shape[1] * axes < width:
        raise ValueError(
            f"lrpe_angles: theta must be (heads, at least {math.ceil(width / max(1, axes))}) for "
            f"{axes} axes and heads of width {width}, got {tuple(theta.shape)}"
        )
    dtype = compute_dtype(theta.dtype)
    turned = index.to(dtype)[..., None, :, :, None] * theta.to(dtype)[:, None, None]
    return turned.flatten(-2)[..., :width]


def lrpe(x: Tensor, angles: Tensor) -> Tensor:
    """`[x cos, x sin]`: `(B, H, N, K)` and angles that broadcast to it give `(B, H, N, 2 K)`."""
    x_wide = x.to(compute_dtype(x.dtype))
    return torch.cat([x_wide * angles.cos(), x_wide * angles.sin()], dim=-1).to(x.dtype)


def initial_theta(heads: int, width: int) -> Tensor:
    """`10000^(-2 j / (H E))` over the flattened index `j`, `(H, E)`."""
    count = heads * width
    return (10000.0 ** (-2 / count * torch.arange(count))).reshape(heads, width)


class LRPE(nn.Module):
    """Learned angles of one axis, `theta` `(H, 1, D)` as in the released checkpoints.

    Args:
        heads: `H`.
        width: `D`, channels of a head.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(initial_theta(heads, width)[:, None])

    def forward(self, position: Tensor) -> Tensor:
        """Angles `(B, H, N, D)` of tokens at `position` `(B, N)`, counted from the stream's start."""
        return lrpe_angles(self.theta[:, 0], position[..., None], self.theta.shape[-1])
