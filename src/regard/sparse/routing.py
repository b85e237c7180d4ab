"""Routing Transformer: attention inside clusters that online k-means keeps up to date.

Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997
(TACL 2021). Every head has `C` centroids. Cluster `c` takes the `w` tokens of the sequence that score
highest against its centroid, so that clusters are of equal size, overlap, and miss some tokens;
queries attend to the keys of their cluster, and a token in several gets the mean of what it found.
With `C = w = sqrt(N)` the cost is O(N^1.5).

Two forms:

- `"official"` (google-research/google-research, routing_transformer/utils.py): queries and keys are
  layer-normalised, for the routing and for the scores alike, which have no further factor. In
  decoders keys are the queries (`share_qk`).
- `"pypi"` (the package `routing-transformer`): the routing alone sees queries and keys of unit length;
  scores are `q k / sqrt(D)`; shared keys have unit length, and a token scores -5e4 with itself, so
  that it reads itself only where it is alone. The package's learned memory keys are not included.

Causality is judged by position. The official code judges it by rank in the sorted lists, which is the
same where queries and keys share theirs. Which earlier tokens are in a cluster depends on later ones,
in training: no later value is ever read, but a causal forward pass over a whole text is not what
decoding (:class:`~regard.sparse.routing_cache.RoutingCache`) computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.card import Card
from regard.core.select import choose_blocks
from regard.core.token_select import list_chosen

from .routing_clusters import inside, members, scattered
from .routing_kmeans import check_form, cluster_scores, route_norm

CARD = Card(
    key="routing",
    title="Efficient Content-Based Sparse Attention with Routing Transformers",
    arxiv="2003.05997",
    family="sparse",
    entry="regard.sparse.routing_module:RoutingAttention",
    definition="tests/sparse/test_routing.py::test_is_its_definition",
    oracle="python -m tests.golden tests/golden/data/routing.npz",
    claim="python -m benchmarks.routing --only planted",
    cost="python -m benchmarks.routing --only growth",
    note="Decoding selects among what has been read, so it differs from a training pass.",
)

# Added to the number of clusters that a token is in, by form.
SCATTER_EPS = {"official": 1e-2, "pypi": 1e-5}
_SELF_SCORE = -5e4


@torch.no_grad()
def routing_lists(x: Tensor, means: Tensor, window: int, real: Tensor | None = None) -> Tensor:
    """The tokens of each cluster: the `window` closest to its centroid, of equals the earlier.

    Args:
        x: normalised tokens `(B, H, N, D)`, see :func:`~regard.sparse.routing_kmeans.route_norm`.
        means: centroids `(H, C, D)`.
        window: `w`, tokens a cluster.
        real: bool `(B, N)`, tokens that are not padding; the others are in no cluster.

    Returns:
        int64 `(B, H, C, K)`: ascending positions, padded with -1; `K` is `w`, or less where no
        sequence has as many tokens.
    """
    b, h, n, _ = x.shape
    scores = cluster_scores(x, means).mT
    allowed = torch.ones(1, 1, 1, n, dtype=torch.bool, device=x.device)
    if real is not None:
        allowed = real[:, None, None]
    chosen = choose_blocks(scores, allowed, window)
    return list_chosen([chosen], (b, h, means.shape[1]), x.device)


def routing_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    means: Tensor,
    window: int,
    *,
    causal: bool = False,
    share_qk: bool | None = None,
    form: str = "official",
    pad_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    self_score: float | None = None,
    eps: float | None = None,
) -> Tensor:
    """Attention inside the clusters of given centroids.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, Hkv, M, D)`, `Hkv` divides `H`; with `share_qk` it is not read and may be `None`.
        v: `(B, Hkv, M, Dv)`.
        means: centroids `(H, C, D)`. They get no gradient.
        window: `w`, tokens of a cluster, at most `N` and `M`.
        causal: a query reads no later key; queries are the last `N` of `M` positions.
        share_qk: keys are the queries; by default as `causal`.
        form: `"official"` or `"pypi"`, see the module.
        pad_mask: bool `(B, N)`, True for real tokens; the others are in no cluster and get 0.
        key_mask: the same for keys `(B, M)`; by default `pad_mask` where `M = N`.
        scale: factor on the scores, default 1 (`"official"`) or `D ** -0.5` (`"pypi"`).
        self_score: with `share_qk`, the score of a token with itself instead of its own; default
            `None`, which leaves it (`"official"`), or -5e4 (`"pypi"`).
        eps: added to the number of clusters that a token is in, default 1e-2 or 1e-5.

    Returns:
        `(B, H, N, Dv)` in the dtype of `q`: `sum over clusters / (their number + eps)`; 0 for tokens
        in no cluster. A causal query whose cluster holds no earlier key finds 0 there.

    Raises:
        ValueError: `window` beyond `N` or `M`, shapes that do not fit, an unknown form.
    """
    shared = causal if share_qk is None else share_qk
    _check(q, k, v, means, window, shared, form, self_score)
    n, m = q.shape[2], v.shape[2]
    real_k = pad_mask if key_mask is None and n == m else key_mask
    for name, real, length in (("pad_mask", pad_mask, n), ("key_mask", key_mask, m)):
        check_real(name, real, q.shape[0], length)
    if shared and key_mask is not None:
        raise ValueError("routing_attention: key_mask came with share_qk, expected pad_mask alone")
    ready = prepare(q, k, shared, form)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    at_q = routing_lists(ready.near_q, means, window, pad_mask)
    at_k = at_q if shared else routing_lists(ready.near_k, means, window, real_k)
    found = inside(
        members(ready.q, at_q),
        members(ready.k, at_k),
        members(v, at_k),
        torch.where(at_q >= 0, at_q + (m - n), -1),
        at_k,
        ranked=causal and shared,
        causal=causal,
        scale=default_scale(form, q.shape[-1]) if scale is None else scale,
        self_score=default_self_score(form, shared) if self_score is None else self_score,
    )
    return scattered(found, at_q, n, SCATTER_EPS[form] if eps is None else eps)


class Prepared(NamedTuple):
    """What enters the scores, `q` and `k`, and what is compared with centroids."""

    q: Tensor
    k: Tensor
    near_q: Tensor
    near_k: Tensor


def prepare(q: Tensor, k: Tensor | None, shared: bool, form: str) -> Prepared:
    """Queries and keys as a form wants them, all with the heads of `q`."""
    near_q = route_norm(q, form)
    if shared or k is None:
        near_k, raw_k = near_q, near_q
    else:
        raw_k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        near_k = route_norm(raw_k, form)
    if form == "official":
        return Prepared(near_q.to(q.dtype), near_k.to(q.dtype), near_q, near_k)
    return Prepared(q, raw_k.to(q.dtype), near_q, near_k)


def default_scale(form: str, width: int) -> float:
    """Factor on the scores: LayerNorm leaves no need of one."""
    return 1.0 if form == "official" else width**-0.5


def default_self_score(form: str, shared: bool) -> float | None:
    """What a token scores with itself, `None` for what it does."""
    return _SELF_SCORE if form == "pypi" and shared else None


def check_real(name: str, real: Tensor | None, batch: int, length: int) -> None:
    """Raise `ValueError` unless `real` is `None` or bool `(batch, length)`."""
    if real is not None and (real.dtype != torch.bool or real.shape != (batch, length)):
        raise ValueError(
            f"routing_attention: {name} must be bool ({batch}, {length}), True for real tokens, got "
            f"{real.dtype} {tuple(real.shape)}"
        )


def _check(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    means: Tensor,
    window: int,
    shared: bool,
    form: str,
    self_score: float | None,
) -> None:
    check_form("routing_attention", form)
    if q.dim() != 4 or v.dim() != 4 or (k is not None and k.dim() != 4):
        raise ValueError(
            "routing_attention: q, k and v must be (batch, heads, length, width), got "
            f"{tuple(q.shape)}, {None if k is None else tuple(k.shape)} and {tuple(v.shape)}"
        )
    h, n, d = q.shape[1:]
    if means.dim() != 3 or (means.shape[0], means.shape[2]) != (h, d) or means.shape[1] == 0:
        raise ValueError(
            f"routing_attention: means must be ({h}, C, {d}), got {tuple(means.shape)}"
        )
    keys = q if shared else k
    if keys is None:
        raise ValueError("routing_attention: k is None, expected keys where share_qk is False")
    for name, x in (("k", keys), ("v", v)):
        if x.shape[1] == 0 or h % x.shape[1]:
            raise ValueError(
                f"routing_attention: {name} has {x.shape[1]} heads, which does not divide q's {h}"
            )
    if keys.shape[2] != v.shape[2]:
        raise ValueError(
            f"routing_attention: v has {v.shape[2]} tokens, expected the keys' {keys.shape[2]}"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"routing_attention: window must be an integer >= 1, got {window!r}")
    if window > min(n, v.shape[2]):
        raise ValueError(
            f"routing_attention: window is {window}, expected at most the {n} queries and "
            f"{v.shape[2]} keys"
        )
    if self_score is not None and not shared:
        raise ValueError("routing_attention: self_score needs share_qk, expected None without it")
