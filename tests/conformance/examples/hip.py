"""HiP: the search block by block in plain Python, and attention over what it keeps."""

from __future__ import annotations

import math
from functools import partial

import torch

from regard.sparse.hip import HiP, HipState, hip_attention, hip_blocks, hip_select
from tests.conformance import AttentionExample
from tests.core.dense import dense_attention


def search(rows, keys, mask_k, block_k, window):
    """Kept blocks of one query block; `keys` are those that its last row sees."""
    before = max(0, len(keys) - window)
    n, kb = math.ceil(before / block_k), mask_k // block_k
    if before <= mask_k:
        return list(range(n))
    odd = rows[1::2] if len(rows) > 1 else rows
    spans = [(n * i // kb, n * (i + 1) // kb) for i in range(kb)]
    group = n / kb
    while group > 1:
        halves = []
        for s, e in spans:
            m = s + (e - s) // 2
            halves += [(s, m), (m, e)]
        worth = [
            float((odd @ keys[s * block_k : (s + 1) * block_k].T).max()) if e > s else -math.inf
            for s, e in halves
        ]
        order = sorted(range(len(halves)), key=lambda x: -worth[x])
        spans = [halves[x] for x in order[:kb]]
        group /= 2
    return sorted(s for s, _ in spans)


def kept(q, k, mask_k=8, block_q=4, block_k=2, window=4):
    """Kept blocks of every batch entry, head and query block, as nested lists."""
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    return [
        [
            [
                search(
                    q[b, h, at : at + block_q],
                    k[b, h // group, : min(m, at + block_q + m - n)],
                    mask_k,
                    block_k,
                    window,
                )
                for at in range(0, n, block_q)
            ]
            for h in range(q.shape[1])
        ]
        for b in range(q.shape[0])
    ]


def pairs(q, k, mask_k=8, block_q=4, block_k=2, window=4):
    """Which pairs HiP attends to, bool (B, H, N, M)."""
    n, m = q.shape[2], k.shape[2]
    lists = kept(q, k, mask_k, block_q, block_k, window)
    out = torch.zeros(q.shape[0], q.shape[1], n, m, dtype=torch.bool)
    for b, heads in enumerate(lists):
        for h, blocks in enumerate(heads):
            for at, ids in enumerate(blocks):
                rows = slice(at * block_q, min(n, (at + 1) * block_q))
                end = rows.stop + m - n
                for one in ids:
                    out[b, h, rows, one * block_k : (one + 1) * block_k] = True
                out[b, h, rows, max(0, end - window) : end] = True
    causal = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    return out & causal


def _dense(q, k, v, **sizes):
    return dense_attention(q, k, v, pairs(q, k, **sizes))[0]


SMALL = {"mask_k": 8, "block_q": 4, "block_k": 2, "window": 4}
ROWS = {"mask_k": 6, "block_q": 1, "block_k": 3, "window": 2}

EXAMPLES = [
    AttentionExample(
        partial(hip_attention, **SMALL),
        partial(_dense, **SMALL),
        lengths=((1, 1), (7, 7), (65, 65), (5, 33), (2, 40)),
        bad=(
            (lambda: HiP(7), "mask_k must be a multiple of block_k, got 7 and 2"),
            (lambda: HiP(0), "mask_k must be an integer >= 1, got 0"),
            (lambda: HiP(window=-1), "window must be an integer >= 0, got -1"),
            (lambda: HiP(block_q=0), "block_q must be an integer >= 1"),
            (lambda: HiP(refresh=0), "refresh must be an integer >= 1"),
            (lambda: HipState(0), "refresh must be an integer >= 1"),
            (lambda: hip_select(torch.randn(3, 4), torch.randn(3, 4)), "batch, heads, length"),
            (
                lambda: hip_blocks(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8)),
                "does not fit q",
            ),
        ),
    ),
    # One row a block: nothing depends on a later token.
    AttentionExample(
        partial(hip_attention, **ROWS),
        partial(_dense, **ROWS),
        lengths=((1, 1), (7, 7), (33, 33), (5, 33)),
        causal=True,
        bad=((lambda: HiP(6, block_k=4), "multiple of block_k"),),
    ),
]
