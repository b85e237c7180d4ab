"""S2-Attention: masks with shards, dense heads and without causality; attention with key heads."""

from __future__ import annotations

import torch

from regard.patterns.s2 import is_kv_efficient, s2_attention, s2_kv_keep, s2_mask
from tests.conformance import AttentionExample, MaskExample
from tests.core.dense import dense_attention


def _definition(n, m, *, h=4, hk=2, c=4, w=2, v=2, e=0, o=0):
    out = torch.zeros(h, n, m, dtype=torch.bool)
    step = max(1, int(v / h))
    for head in range(h):
        key_head = head // (h // hk)
        for row in range(n):
            i = row + m - n
            for j in range(i + 1):
                a, b = i // c, j // c
                shard = key_head >= hk - e or (b + key_head * step + o) % v == 0
                out[head, row, j] = a - b < w or shard
    return out


def _relative(n, m, c=4, left=1, right=2, v=3):
    a = (torch.arange(m - n, m) // c)[:, None]
    b = (torch.arange(m) // c)[None]
    x = (a - b - left + 1).clamp(min=0) + (b - a - right + 1).clamp(min=0)
    return x % v == 0


def _fast(q, k, v):
    return s2_attention(q, k, v, block=4, local_blocks=2, vert_stride=2)


def _dense(q, k, v):
    return dense_attention(q, k, v, _definition(q.shape[2], k.shape[2]))[0]


def _last_dense(n, m):
    return _definition(n, m, h=6, hk=3, c=3, v=4, w=1, e=1, o=3)


EXAMPLES = [
    MaskExample(s2_mask(4, 4, 2, 2, 2), 50, 50, _definition, causal=True),
    MaskExample(s2_mask(4, 4, 2, 2, 2), 7, 41, _definition, causal=True),
    MaskExample(s2_mask(6, 3, 1, 4, 3, 1, 3), 37, 40, _last_dense, causal=True),
    MaskExample(s2_mask(2, 4, (1, 2), 3, causal=False), 45, 45, _relative),
    AttentionExample(
        _fast,
        _dense,
        causal=True,
        bad=(
            (lambda: s2_mask(4, kv_heads=3), "kv_heads=3 does not divide heads=4"),
            (lambda: s2_mask(4, local_blocks=0), "local_blocks must be an integer >= 1"),
            (lambda: s2_mask(4, homo=True, dense_heads=1), "homo has one pattern"),
            (lambda: s2_mask(4, dense_heads=5), "there are 4 key heads"),
            (lambda: s2_mask(4, vert_stride=0), "vert_stride must be an integer >= 1"),
            (lambda: s2_mask(4, local_blocks=(2, 2)), "nothing to the right"),
            (lambda: s2_mask(8).dense(5, 3), "as many keys as queries"),
            (lambda: s2_kv_keep(s2_mask(8), 8, 0), r"h must lie in 0\.\.7"),
            (lambda: s2_kv_keep(s2_mask(8, causal=False), 0, 0), "never reads a dropped block"),
            (lambda: is_kv_efficient(torch.ones(3, 3)), "bool"),
        ),
    ),
]
