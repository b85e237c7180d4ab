"""Routing attention: cluster by cluster and row by row, and the module on separate clusters."""

from __future__ import annotations

import math

import torch

from regard.sparse.routing import routing_attention
from regard.sparse.routing_cache import RoutingCache
from regard.sparse.routing_clusters import Members
from regard.sparse.routing_kmeans import route_norm
from regard.sparse.routing_module import RoutingAttention
from tests.conformance import AttentionExample, MaskExample, ModuleExample

OFFICIAL = {"scale": 1.0, "eps": 1e-2, "self_score": None}
PYPI = {"scale": None, "eps": 1e-5, "self_score": -5e4}


def normal(row, form):
    """One row on its sphere."""
    if form == "official":
        row = row - row.mean()
        return row / (row.square().mean() + 1e-6).sqrt()
    return row / row.norm().clamp(min=1e-12)


def best(scores, window, real):
    """Positions of the largest scores, earlier ones first among equals, ascending."""
    order = sorted((i for i in range(len(scores)) if real[i]), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:window])


def rows(q, k, v, means, window, *, causal, shared, form, real_q, real_k, scale, eps, self_score):
    """One head in float64: `(N, Dv)`."""
    near_q = torch.stack([normal(x, form) for x in q])
    near_k = near_q if shared else torch.stack([normal(x, form) for x in k])
    if form == "official":
        q, k = near_q, near_k
    elif shared:
        k = near_k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    total, count = torch.zeros(len(q), v.shape[-1]).double(), [0] * len(q)
    for centre in means.double():
        members_q = best(near_q @ centre, window, real_q)
        members_k = members_q if shared else best(near_k @ centre, window, real_k)
        for i in members_q:
            seen = [j for j in members_k if not causal or j <= i + len(k) - len(q)]
            count[i] += 1
            if not seen:
                continue
            scores = torch.stack([q[i] @ k[j] * scale for j in seen])
            if shared and self_score is not None:
                scores = torch.stack(
                    [s if j != i else s * 0 + self_score for j, s in zip(seen, scores, strict=True)]
                )
            total[i] = total[i] + scores.softmax(0) @ v[seen]
    return total / (torch.tensor(count).double() + eps)[:, None]


def definition(
    q, k, v, means, window, *, causal, shared, form, pad_mask=None, key_mask=None, **how
):
    """All heads of all sequences."""
    q, v = q.double(), v.double()
    k = q if k is None else k.double()
    b, h, n, m = *q.shape[:3], v.shape[2]
    how = {**(OFFICIAL if form == "official" else PYPI), **how}
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    for x in range(b):
        real_q = [True] * n if pad_mask is None else pad_mask[x].tolist()
        real_k = [True] * m if key_mask is None else key_mask[x].tolist()
        for y in range(h):
            keys, values = k[x, y // (h // k.shape[1])], v[x, y // (h // v.shape[1])]
            out[x, y] = rows(
                q[x, y],
                q[x, y] if shared else keys,
                values,
                means[y],
                window,
                causal=causal,
                shared=shared,
                form=form,
                real_q=real_q,
                real_k=real_k,
                **how,
            )
    return out


def centres(heads, clusters, width, form="official"):
    g = torch.Generator().manual_seed(width)
    return route_norm(torch.randn(heads, clusters, width, dtype=torch.float64, generator=g), form)


ONE = torch.zeros(1, 2, 6, 4)
MEANS = torch.zeros(2, 3, 4)
BAD = (
    (lambda: routing_attention(ONE, ONE, ONE, MEANS, 7), "window is 7, expected at most the 6"),
    (lambda: routing_attention(ONE, ONE, ONE, MEANS, 0), "window must be an integer >= 1, got 0"),
    (lambda: routing_attention(ONE, ONE, ONE, MEANS[:1], 2), r"means must be \(2, C, 4\)"),
    (lambda: routing_attention(ONE, ONE, ONE, MEANS, 2, form="tf"), "form must be one of"),
    (lambda: routing_attention(ONE, None, ONE, MEANS, 2), "k is None"),
    (lambda: routing_attention(ONE, ONE[:, :0], ONE, MEANS, 2), "does not divide q's 2"),
    (lambda: routing_attention(ONE, ONE[:, :, :5], ONE, MEANS, 2), "expected the keys' 5"),
    (lambda: routing_attention(ONE[0], ONE, ONE, MEANS, 2), "batch, heads, length, width"),
    (lambda: routing_attention(ONE, ONE, ONE, MEANS, 2, self_score=0.0), "needs share_qk"),
    (
        lambda: routing_attention(ONE, ONE, ONE, MEANS, 2, pad_mask=torch.ones(1, 5) > 0),
        r"pad_mask must be bool \(1, 6\)",
    ),
    (
        lambda: routing_attention(
            ONE, None, ONE, MEANS, 2, causal=True, key_mask=torch.ones(1, 6) > 0
        ),
        "key_mask came with share_qk",
    ),
    (lambda: RoutingCache(MEANS, 0), "window must be an integer >= 1"),
    (lambda: RoutingCache(MEANS, 2, share_qk=False).attend(ONE, None, ONE), "k is None"),
    (lambda: RoutingCache(MEANS, 2, share_qk=False, self_score=0.0), "needs share_qk"),
    (lambda: RoutingCache(MEANS, 2).attend(ONE, None, ONE[:, :, :3]), "of the same tokens"),
    (lambda: RoutingAttention(0, 4, 3, 2), "heads must be an integer >= 1, got 0"),
    (lambda: RoutingAttention(2, 4, 3, 2, decay=1.5), r"decay must lie in \[0, 1\], got 1.5"),
    (lambda: RoutingAttention(2, 4, 3, 2, form="tf"), "form must be one of"),
    (lambda: RoutingAttention(2, 4, 3, 2).new_cache(), "decoding needs causal=True"),
    (lambda: RoutingAttention(3, 4, 3, 2)(ONE, ONE, ONE), "expected 3 heads of 4"),
)


def _window(q, v):
    return max(1, math.ceil(min(q.shape[2], v.shape[2]) / 3))


def _function(form, causal, shared, lengths):
    def fast(q, k, v):
        means = centres(q.shape[1], 4, q.shape[-1], form)
        return routing_attention(
            q, k, v, means, _window(q, v), causal=causal, share_qk=shared, form=form
        )

    def slow(q, k, v):
        means = centres(q.shape[1], 4, q.shape[-1], form)
        return definition(q, k, v, means, _window(q, v), causal=causal, shared=shared, form=form)

    return AttentionExample(fast, slow, lengths=lengths, bad=BAD)


def _one_cluster():
    """One cluster of the whole sequence: nothing is chosen, so causal to the bit."""

    def fast(q, k, v):
        means = centres(q.shape[1], 1, q.shape[-1])
        return routing_attention(q, k, v, means, q.shape[2], causal=True)

    def slow(q, k, v):
        means = centres(q.shape[1], 1, q.shape[-1])
        return definition(q, k, v, means, q.shape[2], causal=True, shared=True, form="official")

    return AttentionExample(fast, slow, lengths=((1, 1), (7, 7), (41, 41)), causal=True, bad=BAD)


def _module(form, shared):
    """Three clusters far apart, of four tokens each, so that rounding changes no choice."""

    def make():
        module = RoutingAttention(2, 8, 3, 4, causal=shared, form=form)
        module.means.copy_(route_norm(4 * torch.eye(3, 8).expand(2, 3, 8), form))
        return module

    def inputs(dtype):
        g = torch.Generator().manual_seed(0)
        place = 4 * torch.eye(3, 8).repeat(4, 1)
        q, k = place + torch.rand(2, 2, 2, 12, 8, generator=g) / 2
        v = torch.randn(2, 2, 12, 5, generator=g)
        return q.to(dtype), None if shared else k.to(dtype), v.to(dtype)

    return ModuleExample(make, inputs, bad=BAD)


def _members(n, m, causal):
    """Members of two clusters of one head, the last of the second missing."""
    at_q = torch.stack([torch.arange(n) * 2, torch.arange(n) * 3 + 1])[None]
    at_k = torch.stack([torch.arange(m) * 2 + 1, torch.arange(m) * 2])[None]
    at_k[0, 1, -1] = -1
    dense = torch.zeros(1, 2, n, m, dtype=torch.bool)
    for y in range(2):
        for r in range(n):
            for j in range(m):
                key = int(at_k[0, y, j])
                dense[0, y, r, j] = key >= 0 and (not causal or key <= int(at_q[0, y, r]))
    return MaskExample(Members(at_q, at_k, causal), n, m, lambda *_: dense)


SQUARE = ((1, 1), (7, 7), (40, 40))
EXAMPLES = [
    _members(20, 20, True),
    _members(9, 14, False),
    _members(14, 9, True),
    _function("official", False, False, (*SQUARE, (5, 33), (33, 5))),
    _function("official", True, True, SQUARE),
    _function("official", True, False, (*SQUARE, (5, 33))),
    _function("pypi", False, False, SQUARE),
    _function("pypi", True, True, SQUARE),
    _one_cluster(),
    _module("official", False),
    _module("official", True),
    _module("pypi", True),
]
