"""CCA-Attention: its masks, and attention with every way of pooling."""

from __future__ import annotations

import torch

from regard.sparse.cca import CCACache, cca_attention, core_tokens
from regard.sparse.cca_parts import CoreTokens, LocalTokens
from tests.conformance import AttentionExample, MaskExample


def _seen(position, group, window):
    """`J` of a 0-based position."""
    return max(0, (position + 1 - window) // group)


def _local(group, window):
    def definition(n, m):
        out = torch.zeros(n, m, dtype=torch.bool)
        for row in range(n):
            i = row + m - n
            out[row, _seen(i, group, window) * group : i + 1] = True
        return out

    return definition


def _core(group, window, ahead):
    def definition(n, m):
        out = torch.zeros(n, m, dtype=torch.bool)
        for row in range(n):
            out[row, : _seen(row + m - n + ahead, group, window)] = True
        return out

    return definition


def _definition(group, window, pool):
    """The rule row by row: core tokens and keys of a row, one softmax."""

    def attention(q, k, v):
        q, k, v = q.double(), k.double(), v.double()
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        scale = q.shape[-1] ** -0.5
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
        for i in range(q.shape[2]):
            seen = _seen(i, group, window)
            keys, values = [k[:, :, seen * group : i + 1]], [v[:, :, seen * group : i + 1]]
            for c in range(seen):
                members = slice(c * group, (c + 1) * group)
                if pool == "cca":
                    query = q[:, :, (c + 1) * group - 1, :, None]
                    w = (k[:, :, members] @ query * scale).softmax(2)
                    pooled = [(w * x[:, :, members]).sum(2, keepdim=True) for x in (k, v)]
                elif pool == "mean":
                    pooled = [x[:, :, members].mean(2, keepdim=True) for x in (k, v)]
                else:
                    pooled = [x[:, :, members].amax(2, keepdim=True) for x in (k, v)]
                keys.append(pooled[0])
                values.append(pooled[1])
            key, value = torch.cat(keys, 2), torch.cat(values, 2)
            scores = (q[:, :, i, None] * key).sum(-1) * scale
            out[:, :, i] = (scores.softmax(-1)[..., None] * value).sum(2)
        return out

    return attention


def _example(group, window, pool="cca", lengths=((1, 1), (7, 7), (41, 41))):
    x = torch.zeros(1, 2, 6, 4)
    return AttentionExample(
        lambda q, k, v: cca_attention(q, k, v, group, window, pool),
        _definition(group, window, pool),
        lengths=lengths,
        causal=True,
        bad=(
            (lambda: cca_attention(x, x, x, 0), "group must be an integer >= 1"),
            (lambda: cca_attention(x, x, x, 2, 0), "window must be an integer >= 1"),
            (lambda: cca_attention(x, x, x, pool="sum"), "pool must be one of cca, mean, max"),
            (lambda: core_tokens(x, x, x, 2, "sum"), "pool must be one of"),
            (lambda: CCACache(pool="sum"), "pool must be one of"),
            (lambda: cca_attention(x[:, :, :2], x, x), "q has 2 tokens, but k has 6"),
            (lambda: CCACache(2, 2).attend(x[:, :, :2], x, x), "q has 2 tokens, but k has 6"),
        ),
    )


EXAMPLES = [
    MaskExample(LocalTokens(4, 6), 53, 53, _local(4, 6), causal=True),
    MaskExample(LocalTokens(5, 1), 9, 44, _local(5, 1), causal=True),
    MaskExample(LocalTokens(1, 1), 20, 20, _local(1, 1), causal=True),
    MaskExample(CoreTokens(4, 6, 41), 53, 12, _core(4, 6, 41)),
    MaskExample(CoreTokens(3, 1, 20), 4, 10, _core(3, 1, 20)),
    _example(4, 6),
    _example(4, 1),
    _example(1, 3),
    _example(3, 5, "mean"),
    _example(3, 5, "max"),
]
