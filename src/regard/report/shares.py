"""A mask as a small grid of shares, without its N x M tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.masks import Mask

# Pairs evaluated at once: 16 MB of int64 positions.
_PAIRS_AT_ONCE = 1 << 21
# Above this, a mask without closed tiles would be evaluated for longer than anybody waits.
MAX_PAIRS = 1 << 32


def shares(mask: Mask, n: int, m: int | None = None, cells: int = 256, head: int = 0) -> Tensor:
    """Share of allowed pairs in each cell of a grid over the ``n x m`` pairs.

    Args:
        mask: what to draw; of a batch of masks, the first entry.
        n, m: numbers of queries and keys; ``m`` defaults to ``n``.
        cells: most cells along an axis; shorter axes get one cell a position.
        head: which head of a per-head mask.

    Returns:
        Exact shares, float32 ``(rows, columns)`` in [0, 1].

    Raises:
        ValueError: a size is out of range, or the mask does not fit it.
    """
    m = n if m is None else m
    if n < 1 or m < 1 or n * m > MAX_PAIRS:
        raise ValueError(f"picture: expected 1 <= n and n * m <= {MAX_PAIRS}, got {n} x {m}")
    mask.check(n, m)
    rows, cols = _edges(n, cells) + (m - n), _edges(m, cells)
    i0, i1 = rows[:-1, None], rows[1:, None] - 1
    j0, j1 = cols[None, :-1], cols[None, 1:] - 1
    i0, i1, j0, j1 = torch.broadcast_tensors(i0, i1, j0, j1)
    some, every = mask.tile(i0, i1, j0, j1, head, 0)
    out = every.float().expand_as(i0).clone()
    open_cells = (some & ~every).expand_as(out).nonzero()
    if open_cells.numel() == 0:
        return out
    high, wide = int((i1 - i0).max()) + 1, int((j1 - j0).max()) + 1
    for part in open_cells.split(max(1, _PAIRS_AT_ONCE // (high * wide))):
        r, c = part[:, 0], part[:, 1]
        i = i0[r, c][:, None] + torch.arange(high)
        j = j0[r, c][:, None] + torch.arange(wide)
        inside = (i <= i1[r, c][:, None])[:, :, None] & (j <= j1[r, c][:, None])[:, None, :]
        i, j = i.clamp(max=m - 1)[:, :, None], j.clamp(max=m - 1)[:, None, :]
        allowed = mask.allows(i, j, head, 0).expand_as(inside) & inside
        out[r, c] = allowed.float().sum((1, 2)) / inside.float().sum((1, 2))
    return out


def _edges(length: int, cells: int) -> Tensor:
    """Cell borders of an axis: ``min(length, cells) + 1`` integers from 0 to ``length``."""
    count = min(length, cells)
    return torch.arange(count + 1) * length // count
