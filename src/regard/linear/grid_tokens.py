"""Tokens of an image: those of a grid in row-major order, behind class tokens."""

from __future__ import annotations

from torch import Tensor


def check_grid_tokens(
    who: str, x: Tensor, grid: tuple[int, int], dim: int, num_prefix: int = 0
) -> None:
    """Raise ``ValueError`` unless `x` is `(B, num_prefix + h * w, dim)`.

    Args:
        who: the layer, which the message names.
        x: tokens.
        grid: `(h, w)`.
        dim: channels.
        num_prefix: class tokens.
    """
    tokens = num_prefix + grid[0] * grid[1]
    if x.dim() != 3 or tuple(x.shape[1:]) != (tokens, dim):
        raise ValueError(f"{who}: x must be (batch, {tokens}, {dim}), got {tuple(x.shape)}")
