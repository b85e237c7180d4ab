"""CLEAR: image tokens attend within a circle, text tokens everywhere, at linear cost.

Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", arXiv
2412.16112. A sequence is `T` text tokens and then an image of `h x w` tokens, row by row. Query `i`
sees key `j` if either is text, or if both are image tokens less than `r` apart (eq. 4):

    i < T  or  j < T  or  Δy² + Δx² < r²

The optional pooled tokens (section 3.4 of the code's second variant) give image queries a coarse view
of the rest: `f x f` keys and values summed with learned weights, after the rotary embedding. The
softmax runs over the union, here as two parts joined by their log-sum-exp.

The authors' code fixes 512 text tokens in its pooling; here `T` is an argument.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.card import Card
from regard.core.attend import attend
from regard.core.masks import Mask
from regard.core.merge import merge

from .clear_mask import Clear

__all__ = ["CARD", "Clear", "ClearPool", "clear_attention", "clear_mask", "proportional_scale"]

CARD = Card(
    key="clear",
    title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    arxiv="2412.16112",
    family="kernel",
    entry="regard.patterns.clear:clear_attention",
    definition="tests/patterns/test_clear.py::test_equals_the_definition",
    oracle="python -m tests.golden tests/golden/data/clear.npz",
    claim="python -m benchmarks.clear --only reduction",
    cost="python -m benchmarks.clear --only growth",
    note="ClearAttention in patterns/clear_module.py has the names of FLUX's weights.",
)

# Tokens of the images that FLUX was trained on: 64 x 64, and 512 of text.
TRAINED_TOKENS = 64**2 + 512


def clear_mask(height: int, width: int, radius: float, text: int = 0) -> Mask:
    """The pattern of `text` tokens before a `height x width` image; see :class:`Clear`."""
    return Clear(height, width, radius, text)


def proportional_scale(
    keys: int, dim: int, *, pooled: bool = False, trained: int = TRAINED_TOKENS
) -> float:
    """Factor on the scores at another resolution, `sqrt(log_trained(keys) / dim)` (section 3.4).

    Args:
        keys: tokens of text and image.
        dim: width of a head.
        pooled: whether pooled keys are used too: the authors' code then takes `10 keys`.
        trained: tokens that the model was trained on, at which the scale is `dim ** -0.5`.
    """
    if keys < 1 or trained < 2:
        raise ValueError(
            f"proportional_scale: expected keys >= 1 and trained >= 2, got {keys} and {trained}"
        )
    return math.sqrt(math.log(10 * keys if pooled else keys, trained) / dim)


class ClearPool(nn.Module):
    """Pools `f x f` tokens into one by learned weights, the same for all heads and channels.

    Args:
        factor: `f`; divides both sides of the grids it is given.

    The parameter `spatial_weight` `(1, 1, 1, f, 1, f, 1)` starts as the mean.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"ClearPool: factor must be >= 1, got {factor}")
        self.factor = factor
        weight = torch.full((1, 1, 1, factor, 1, factor, 1), factor**-2.0)
        self.spatial_weight = nn.Parameter(weight)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, H, h w, D)` on a grid `(h, w)` to `(B, H, h w / f², D)`."""
        (height, width), f = grid, self.factor
        if height % f or width % f:
            raise ValueError(f"ClearPool: factor {f} does not divide the grid {height} x {width}")
        tiles = x.unflatten(2, (height // f, f, width // f, f))
        return (tiles * self.spatial_weight.to(x.dtype)).sum((3, 5)).flatten(2, 3)


def clear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    radius: float | None,
    text: int = 0,
    pool: ClearPool | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of text and image tokens with circular windows (arXiv 2412.16112, eq. 4).

    Args:
        q: `(B, H, T + h w, D)`, text first, positions encoded.
        k, v: `(B, Hkv, T + h w, D)` and `(B, Hkv, T + h w, Dv)`.
        grid: `(h, w)`.
        radius: `r` in tokens, the boundary excluded; the paper uses 8, 16 and 32. None for attention
            everywhere, the teacher's.
        text: `T`.
        pool: gives image queries pooled image tokens as further keys; text queries never see them.
        scale: factor on the scores, default `D ** -0.5`; see :func:`proportional_scale`.

    Returns:
        `(B, H, T + h w, Dv)`.

    Raises:
        ValueError: tokens that are not `T + h w`, `r <= 0`, a factor that does not divide the grid.
    """
    height, width = grid
    if q.dim() != 4 or q.shape[2] != text + height * width:
        raise ValueError(
            f"clear_attention: q has shape {tuple(q.shape)}, expected {text} text tokens and a "
            f"grid of {height} x {width}: (batch, heads, {text + height * width}, width)"
        )
    mask = None if radius is None else Clear(height, width, radius, text)
    if pool is None:
        out: Tensor = attend(q, k, v, mask=mask, scale=scale)
        return out
    near, near_lse = attend(q, k, v, mask=mask, scale=scale, return_lse=True)
    coarse = attend(
        q[:, :, text:],
        pool(k[:, :, text:], grid),
        pool(v[:, :, text:], grid),
        scale=scale,
        return_lse=True,
    )
    image, _ = merge([(near[:, :, text:], near_lse[:, :, text:]), coarse])
    return torch.cat([near[:, :, :text], image], dim=2)
