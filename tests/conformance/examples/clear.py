"""Examples of CLEAR: the mask with and without text, the function, the layer."""

from __future__ import annotations

import torch

from regard.patterns.clear import Clear, ClearPool, clear_attention, proportional_scale
from regard.patterns.clear_module import ClearAttention
from tests.conformance import AttentionExample, MaskExample, ModuleExample


def circle(height, width, radius, text=0):
    """Eq. 4, from coordinates."""

    def definition(n, m):
        at = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
        out = torch.ones(m, m, dtype=torch.bool)
        out[text:, text:] = (
            torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist") < radius
        )
        return out[m - n :]

    return definition


def mask(*shape, rows=None):
    example = Clear(*shape)
    return MaskExample(example, rows or example.tokens, example.tokens, circle(*shape))


def grid_of(q):
    """5 columns, and what is left of them as text: any length has one."""
    return (max(1, q.shape[2] // 5), min(5, q.shape[2])), q.shape[2] % 5 if q.shape[2] > 5 else 0


def attention(q, k, v):
    grid, text = grid_of(q)
    return clear_attention(q, k, v, grid=grid, radius=2.5, text=text)


def definition(q, k, v):
    grid, text = grid_of(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = circle(*grid, 2.5, text)(q.shape[2], q.shape[2])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def tokens(*shapes):
    def inputs(dtype):
        g = torch.Generator().manual_seed(1)
        return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)

    return inputs


Q = torch.zeros(1, 2, 10, 4)

EXAMPLES = [
    mask(8, 8, 3),
    mask(7, 11, 2.5, 5),
    mask(4, 9, 100, 3),
    mask(5, 6, 1, 2),
    mask(6, 5, 3.2, 4, rows=12),
    AttentionExample(
        attention,
        definition,
        lengths=((1, 1), (7, 7), (65, 65), (43, 43)),
        bad=(
            (lambda: clear_attention(Q, Q, Q, grid=(2, 3), radius=2, text=3), "expected 3 text"),
            (lambda: clear_attention(Q, Q, Q, grid=(2, 5), radius=0), "radius must be positive"),
            (
                lambda: clear_attention(Q, Q, Q, grid=(2, 5), radius=2, pool=ClearPool(2)),
                "factor 2 does not divide the grid 2 x 5",
            ),
            (lambda: ClearPool(0), "factor must be >= 1"),
            (lambda: Clear(0, 3, 2), "height >= 1"),
            (lambda: Clear(3, 3, 2).check(9, 12), "grid of 3 x 3, 9 in all"),
            (lambda: proportional_scale(0, 8), "keys >= 1"),
        ),
    ),
    ModuleExample(
        lambda: ClearAttention(8, 2, 2, grid=(4, 6), text=3, pool=2, proportional=True),
        tokens((2, 27, 8)),
        bad=(
            (lambda: ClearAttention(8, 3), "3 heads do not divide dim 8"),
            (lambda: ClearAttention(8, 2)(torch.zeros(1, 9, 8)), "no grid"),
            (
                lambda: ClearAttention(8, 2, grid=(3, 3), joint=True)(torch.zeros(1, 9, 8)),
                "encoder_hidden_states came not along, but the layer is joint",
            ),
        ),
    ),
    ModuleExample(
        lambda: ClearAttention(8, 2, 2, grid=(4, 4), joint=True),
        tokens((1, 16, 8), (1, 5, 8)),
        bad=(
            (
                lambda: ClearAttention(8, 2, grid=(3, 3))(*[torch.zeros(1, 9, 8)] * 2),
                "encoder_hidden_states came along, but the layer is not joint",
            ),
        ),
    ),
]
