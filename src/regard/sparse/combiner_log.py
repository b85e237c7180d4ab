"""Combiner's log pattern: what lies before a query as a Fenwick tree (arXiv 2107.05768, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import compute_dtype


def levels(n: int) -> int:
    """Levels for `n` tokens: the bits of `n - 1`, so that the last token has all its regions."""
    return max(n - 1, 0).bit_length()


def log_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The log pattern: `i` itself, and `[(i >> l) - 1 << l, i >> l << l)` for every bit `l` set in `i`.

    At level `l` the sequence is cut into pairs of blocks of `2^l` tokens; each right block reads the
    one summary of its left block.

    Args:
        q, k, v: `(B, H, N, D)`, `(B, Hkv, N, D)`, `(B, Hkv, N, Dv)`, any `N`.

    Returns:
        `(B, H, N, Dv)`, in O(N log N D) time.
    """
    h, n = q.shape[1], q.shape[2]
    hkv, dtype = k.shape[1], q.dtype
    wide = compute_dtype(dtype)
    q = (q.to(wide) * q.shape[-1] ** -0.5).unflatten(1, (hkv, h // hkv))
    k, v = k.to(wide), v.to(wide)
    logits, values = [(q * k[:, :, None]).sum(-1)], []
    top_q, top_k = q, k
    for level in range(levels(n)):
        size = 1 << level
        # Pairs whose right block has a token: their left blocks are whole.
        pairs = -(-(n - size) // (2 * size))
        score, value = _level(q, k, v, top_q, top_k, size, pairs)
        logits.append(score)
        values.append(value)
        top_q, top_k = _halved(top_q), _halved(top_k)
    weights = torch.stack(logits, -1).softmax(-1)
    out = weights[..., :1] * v[:, :, None]
    for level, value in enumerate(values):
        out = out + _spread(weights[..., level + 1], value, 1 << level)
    return out.flatten(1, 2).to(dtype)


def _level(
    q: Tensor, k: Tensor, v: Tensor, top_q: Tensor, top_k: Tensor, size: int, pairs: int
) -> tuple[Tensor, Tensor]:
    """Scores of the queries for their left block's summary, `-inf` in left blocks, and the
    summaries' values `(B, Hkv, G, pairs, Dv)`.

    Args:
        top_q, top_k: maxima over blocks of `size`, `(B, Hkv, G, blocks, D)` and `(B, Hkv, blocks, D)`.
    """
    left_q, left_k = (x[..., : 2 * pairs : 2, :] for x in (top_q, top_k))
    keys, values = (_left(x, size, pairs) for x in (k, v))
    inside = torch.einsum("bhpsd,bhrpd->bhrps", keys, left_q).softmax(-1)
    value = torch.einsum("bhrps,bhpsd->bhrpd", inside, values)
    score = torch.einsum("bhrpsd,bhpd->bhrps", _right(q, size, pairs), left_k)
    score = torch.stack([torch.full_like(score, -torch.inf), score], -2).flatten(-3)
    # what is left over at the end are tokens of a left block
    score = F.pad(score, (0, max(0, q.shape[-2] - score.shape[-1])), value=-torch.inf)
    return score[..., : q.shape[-2]], value


def _pairs(x: Tensor, size: int, pairs: int) -> Tensor:
    """The first `pairs` pairs of blocks, `(..., pairs, 2, size, D)`; zeros fill the last one up."""
    length = 2 * size * pairs
    return _of_length(x, length).unflatten(-2, (pairs, 2, size))


def _left(x: Tensor, size: int, pairs: int) -> Tensor:
    return _pairs(x, size, pairs)[..., 0, :, :]


def _right(x: Tensor, size: int, pairs: int) -> Tensor:
    return _pairs(x, size, pairs)[..., 1, :, :]


def _halved(top: Tensor) -> Tensor:
    """Maxima over pairs of blocks; a block without a partner is read by nobody and left out."""
    whole = top.shape[-2] // 2 * 2
    return top[..., :whole, :].unflatten(-2, (whole // 2, 2)).amax(-2)


def _spread(weight: Tensor, value: Tensor, size: int) -> Tensor:
    """Each left block's value, weighted by the queries of its right block, `(..., N, Dv)`."""
    n, pairs = weight.shape[-1], value.shape[-2]
    weight = _of_length(weight[..., None], 2 * size * pairs).unflatten(-2, (pairs, 2, size))
    return _of_length((weight * value[..., None, None, :]).flatten(-4, -2), n)


def _of_length(x: Tensor, length: int) -> Tensor:
    """The first `length` rows of `(..., N, D)`, rows of zeros behind a shorter one."""
    short = length - x.shape[-2]
    # padding by nothing would copy
    return F.pad(x, (0, 0, 0, short)) if short > 0 else x[..., :length, :]
