"""Combiner's axial mixture: rows and columns exactly, the rest by running summaries
(arXiv 2107.05768, section 4.3).

Tokens stand in rows of `seg`. Each of the five parts is dense attention inside rows or columns, with
the other axis as batch entries; their log-sum-exps join them. Running maxima (or sums) along an axis
give the pooled queries and keys of all prefixes at once, and one causal attention of the pooled
queries gives all their values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.attend import attend
from regard.core.masks import Causal, Mask, SlidingWindow
from regard.core.merge import merge

# inside a row or column: all but the own place, and the places before it
OTHERS = ~SlidingWindow(0)
BEFORE = Causal() & OTHERS


def axial_attention(q: Tensor, k: Tensor, v: Tensor, seg: int, running: str = "max") -> Tensor:
    """The axial mixture, causal.

    Args:
        q, k, v: `(B, H, N, D)`, `(B, Hkv, N, D)`, `(B, Hkv, N, Dv)`; `seg` divides `N`.
        seg: tokens a row.
        running: `"max"`, or `"sum"` as the official TensorFlow file.

    Returns:
        `(B, H, N, Dv)`, in O(N (seg + N / seg) D) time and O(N) memory.
    """
    h, n = q.shape[1], q.shape[2]
    if k.shape[1] != h:
        # Values of a region depend on the query head, so keys cannot stay shared.
        k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    rows = n // seg
    q, k, v = (x.unflatten(2, (rows, seg)).permute(0, 2, 1, 3, 4) for x in (q, k, v))
    pool = _running(running)
    # Row r of `above` summarises rows 0..r of each column; columns of `left` and `right` summarise
    # what lies left or right in the row, the own column included.
    above = _prefixes(q, k, v, 1, pool)
    left = _prefixes(q, k, v, 3, pool)
    mirrored = _prefixes(q.flip(3), k.flip(3), v.flip(3), 3, pool)
    right = (mirrored[0].flip(3), mirrored[1].flip(3))
    higher = along(q[:, 1:], (above[0][:, :-1], above[1][:, :-1]), 3, OTHERS)
    lefts = along(q[..., 1:, :], (left[0][..., :-1, :], left[1][..., :-1, :]), 1, BEFORE)
    rights = along(q[..., :-1, :], (right[0][..., 1:, :], right[1][..., 1:, :]), 1, BEFORE)
    parts = [
        along(q, (k, v), 3, Causal()),
        along(q, (k, v), 1, BEFORE),
        _padded(higher, 1, (1, 0)),
        _padded(lefts, 3, (1, 0)),
        _padded(rights, 3, (0, 1)),
    ]
    return merge(parts)[0].permute(0, 2, 1, 3, 4).flatten(2, 3)


def _running(kind: str) -> Callable[[Tensor, int], Tensor]:
    def total(x: Tensor, axis: int) -> Tensor:
        return x.cumsum(axis)

    return running_max if kind == "max" else total


def running_max(x: Tensor, axis: int) -> Tensor:
    """`x.cummax(axis).values` by doubling: PyTorch's own goes through the elements one by one."""
    size, reach = x.shape[axis], 1
    while reach < size:
        later = x.narrow(axis, reach, size - reach)
        earlier = x.narrow(axis, 0, size - reach)
        x = torch.cat([x.narrow(axis, 0, reach), torch.maximum(later, earlier)], axis)
        reach *= 2
    return x


def _prefixes(
    q: Tensor, k: Tensor, v: Tensor, axis: int, pool: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values of all prefixes along an axis of `(B, R, H, W, D)`."""
    # No log-sum-exp is needed here, so that PyTorch's fused kernel serves the call.
    values = attend(*(_lines(x, axis) for x in (pool(q, axis), k, v)), mask=Causal())
    return pool(k, axis), _grid(values, q, axis)


def along(q: Tensor, kv: tuple[Tensor, Tensor], axis: int, mask: Mask) -> tuple[Tensor, Tensor]:
    """Attention along one axis of `(B, R, H, W, D)`: inside rows for 3, inside columns for 1.

    Returns:
        output and log-sum-exp `(B, R, H, W)`.
    """
    out, lse = attend(*(_lines(x, axis) for x in (q, *kv)), mask=mask, return_lse=True)
    return _grid(out, q, axis), _grid(lse[..., None], q, axis)[..., 0]


def _lines(x: Tensor, axis: int) -> Tensor:
    """Rows or columns of a grid as batch entries, `(B * lines, H, places, D)`."""
    return (x.transpose(1, 3) if axis == 1 else x).flatten(0, 1)


def _grid(x: Tensor, like: Tensor, axis: int) -> Tensor:
    """Back from :func:`_lines` to the grid of `like`."""
    lines = like.shape[3] if axis == 1 else like.shape[1]
    x = x.unflatten(0, (like.shape[0], lines))
    return x.transpose(1, 3) if axis == 1 else x


def _padded(part: tuple[Tensor, Tensor], axis: int, by: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A part that the first or the last row or column has no share in."""
    out, lse = part
    widths = [0, 0] * (3 - axis) + list(by)
    return F.pad(out, [0, 0, *widths]), F.pad(lse, widths, value=-torch.inf)
