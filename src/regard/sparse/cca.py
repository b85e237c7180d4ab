"""CCA-Attention: older context as one core token a group, recent context exactly, in one softmax.

Chen et al., "Core Context Aware Attention for Long Context Language Modeling", arXiv 2412.12465.
Group `c` of `g` tokens is pooled by what the query of its last token finds in it (Eq. 3):

    w_c = softmax_j(q_{(c+1)g-1} k_j / sqrt(D)),  core key = sum_j w_cj k_j,  core value = sum_j w_cj v_j

A query at position `i` (from 1) reads the first `J_i = max(0, floor((i - s) / g))` core tokens and the
keys `J_i g + 1 .. i` exactly: `s` to `s + g - 1` of them. Time is O(N (N / g + s + g) D), a decoding
step O(M / g + s), and the memory of a cache M / g + s + g entries for each query head.

Rotated keys and values are pooled per query head, as in the authors' code
(chenyaofo/CCA-Attention, codebase/core); the paper's text pools token features before projecting
them. Their Triton kernel takes `(i mod g) + s` exact keys, which is the definition only where `g`
divides `s`, and their project page lets the last core group and the window overlap by a token. This
file follows the definition, as their dense path does.

The authors' setting: `g = 16`, `s = 1024`, after about 1000 steps of fine-tuning. Without it the
output is clearly worse than that of dense attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.card import Card
from regard.core.call import compute_dtype

from .cca_parts import PooledCache, attend_cores, check_sizes

CARD = Card(
    key="cca",
    title="Core Context Aware Attention for Long Context Language Modeling",
    arxiv="2412.12465",
    family="sparse",
    entry="regard.sparse.cca:cca_attention",
    definition="tests/sparse/test_cca.py::test_is_the_papers_rule_row_by_row",
    oracle="python -m tests.golden tests/golden/data/cca.npz",
    claim="python -m benchmarks.cca --smollm2",
    cost="python -m benchmarks.cca --only growth",
    note="Pools rotated keys and values per query head, as the authors' code does.",
)

POOLS = ("cca", "mean", "max")


def group_weights(q: Tensor, k: Tensor, group: int = 16, scale: float | None = None) -> Tensor:
    """What the query of each group's last token gives to the group's keys (Eq. 3).

    Args:
        q: `(B, H, L, D)`; only the last query of every group is read.
        k: `(B, Hkv, L, D)`, the same tokens.
        group: tokens a group; a rest that fills none is left out.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, L // group, group)` in float32, or float64 for float64 input; rows sum to 1.
    """
    return _weights(q[:, :, group - 1 :: group], _groups(k, group), scale).flatten(1, 2)


def core_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int = 16,
    pool: str = "cca",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One key and one value for every whole group of `group` tokens.

    Args:
        q, k, v: `(B, H, L, D)`, `(B, Hkv, L, D)` and `(B, Hkv, L, Dv)` of the same tokens.
        group: tokens a group; a rest that fills none is left out.
        pool: `"cca"` weighs a group's tokens by :func:`group_weights`, once a query head; `"mean"`
            and `"max"` pool keys and values, once a key head, and leave `q` unread.
        scale: factor on the scores of the weights, default `D ** -0.5`.

    Returns:
        core keys `(B, Hc, L // group, D)` and core values `(B, Hc, L // group, Dv)`; `Hc` is `H` for
        `"cca"`, else `Hkv`.
    """
    return pool_groups(q[:, :, group - 1 :: group], k, v, group, pool, scale)


def pool_groups(
    last: Tensor, k: Tensor, v: Tensor, group: int, pool: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """:func:`core_tokens` from the queries of the groups' last tokens alone, `(B, H, C, D)`."""
    if pool not in POOLS:
        raise ValueError(f"core_tokens: pool must be one of {', '.join(POOLS)}, got {pool!r}")
    keys, values = _groups(k, group), _groups(v, group)
    if pool == "mean":
        return keys.mean(3), values.mean(3)
    if pool == "max":
        return keys.amax(3), values.amax(3)
    weights = _weights(last, keys, scale)
    return _weighed(weights, keys), _weighed(weights, values)


def _groups(x: Tensor, group: int) -> Tensor:
    """`(B, H, C, group, D)`."""
    count = x.shape[2] // group
    return x[:, :, : count * group].unflatten(2, (count, group))


def _weights(last: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    """`(B, Hkv, H / Hkv, C, group)` for queries `(B, H, C, D)` and keys `(B, Hkv, C, group, D)`."""
    hkv, wide = keys.shape[1], compute_dtype(last.dtype)
    grouped = last[:, :, : keys.shape[2]].to(wide).unflatten(1, (hkv, last.shape[1] // hkv))
    scores = torch.einsum("bhrcd,bhcgd->bhrcg", grouped, keys.to(wide))
    return (scores * (last.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def _weighed(weights: Tensor, x: Tensor) -> Tensor:
    """Sums over the groups' tokens, `(B, H, C, D)`."""
    out = torch.einsum("bhrcg,bhcgd->bhrcd", weights, x.to(weights.dtype))
    return out.flatten(1, 2).to(x.dtype)


def cca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int = 16,
    window: int = 1024,
    pool: str = "cca",
    *,
    scale: float | None = None,
) -> Tensor:
    """CCA-Attention over a whole sequence; causal.

    Args:
        q: rotated queries `(B, H, N, D)`.
        k, v: rotated keys `(B, Hkv, N, D)` and values `(B, Hkv, N, Dv)`.
        group: `g`, tokens of a core token.
        window: `s`, tokens that a query reads exactly at least, its own among them.
        pool: `"cca"`, `"mean"` or `"max"`, see :func:`core_tokens`.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`. `group = 1` or `window >= N` give causal attention.

    Raises:
        ValueError: not as many keys as queries (decoding goes through :class:`CCACache`), a size
            below 1, or an unknown `pool`.
    """
    check_sizes("cca_attention", group, window)
    if pool not in POOLS:
        raise ValueError(f"cca_attention: pool must be one of {', '.join(POOLS)}, got {pool!r}")
    n = q.shape[2]
    if k.shape[2] != n:
        raise ValueError(
            f"cca_attention: q has {n} tokens, but k has {k.shape[2]}; expected those of the same "
            "tokens (CCACache decodes)"
        )
    pooled = max(0, n - window) // group * group
    before = slice(0, pooled)
    cores = core_tokens(q[:, :, before], k[:, :, before], v[:, :, before], group, pool, scale)
    return attend_cores(q, k, v, *cores, group, window, scale=scale)


class CCACache(PooledCache):
    """Decoding with CCA-Attention: core tokens and the recent keys instead of all keys.

    `cache.attend(q, k, v)` appends any number of tokens and attends from them; all steps together
    give :func:`cca_attention` of the whole sequence.

    Args:
        group, window, pool, scale: as :func:`cca_attention`.
    """

    def __init__(
        self,
        group: int = 16,
        window: int = 1024,
        pool: str = "cca",
        *,
        scale: float | None = None,
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"CCACache: pool must be one of {', '.join(POOLS)}, got {pool!r}")
        super().__init__(group, window, _pooling(group, pool, scale), scale)


def _pooling(
    group: int, pool: str, scale: float | None
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def pooled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return core_tokens(q, k, v, group, pool, scale)

    return pooled
