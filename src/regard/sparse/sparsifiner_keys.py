"""From Sparsifiner's coefficients to lists of keys: see :mod:`regard.sparse.sparsifiner`."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.attend import attend
from regard.core.masks import Full
from regard.core.select import choose_blocks, chosen_layout


def sparse_coefficients(
    coefficients: Tensor, basis_topk: int | None = 8, coef_thr: float = 0.05
) -> Tensor:
    """The coefficients that inference keeps, the others 0, `(B, H, N - 1, n')`.

    Args:
        coefficients: `(B, H, N - 1, n')`, rows sum to 1.
        basis_topk: how many of a row (all where there are fewer); None to keep those above `coef_thr`.
        coef_thr: the threshold, read where `basis_topk` is None.
    """
    if basis_topk is None:
        return coefficients.masked_fill(coefficients <= coef_thr, 0.0)
    every = torch.ones(1, 1, *coefficients.shape[2:], dtype=torch.bool, device=coefficients.device)
    return coefficients.masked_fill(~choose_blocks(coefficients, every, basis_topk), 0.0)


def sparse_basis(back: Tensor, basis_thr: float = 0.02) -> Tensor:
    """`|P_back|` with entries up to `basis_thr` set to 0, `(N, n')`."""
    size = back.abs()
    return size.masked_fill(size <= basis_thr, 0.0)


def choose_keys(
    score: Tensor,
    budget: int,
    score_thr: float | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Which keys each token reads, bool `(B, H, N, N)`, from scores `(B, H, N - 1, N)`.

    Of equal scores the earlier key is taken. Rows that score nothing above 0 still take `budget` keys,
    the earliest: what inference's thresholds empty carries no choice.

    Args:
        score: of all tokens but the class token, which comes first and reads everything.
        budget: keys of a row.
        score_thr: instead of `budget`, the keys whose score is above it; rows may be left without.
        active: bool `(B, N)`, tokens that are not pruned; the others read and are read by nothing.
    """
    b, h, rows, n = score.shape
    if active is None:
        allowed = torch.ones(1, 1, rows, n, dtype=torch.bool, device=score.device)
        first = allowed.new_ones(b, h, 1, n)
    else:
        allowed = active[:, None, 1:, None] & active[:, None, None, :]
        first = (active[:, None, :1, None] & active[:, None, None, :]).expand(b, h, 1, n)
    if score_thr is None:
        chosen = choose_blocks(score, allowed, budget)
    else:
        chosen = (score > score_thr) & allowed
    return torch.cat([first, chosen], dim=2)


def connected_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of every token to its own list of keys.

    The first row, which reads everything, goes by itself: the other lists stay short.

    Args:
        q: `(B, H, N, D)`.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`.
        mask: bool `(B, H, N, M)`.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`; rows without keys are 0.
    """
    want = (*q.shape[:3], k.shape[2])
    if mask.dtype != torch.bool or mask.shape != want:
        raise ValueError(
            f"connected_attend: mask must be bool {want}, got {mask.dtype} {tuple(mask.shape)}"
        )
    parts = []
    for rows in (slice(0, 1), slice(1, None)):
        part, chosen = q[:, :, rows], mask[:, :, rows]
        layout = chosen_layout(chosen, part.shape[2], k.shape[2], 1, Full())
        parts.append(attend(part, k, v, layout=layout, scale=scale))
    return torch.cat(parts, dim=2)
