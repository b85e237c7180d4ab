"""LongHeads: attention over a sequence, and the layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regard.core.rope import rope
from regard.sparse.longheads_cache import LongHeadsAttention, longheads_attention
from regard.sparse.longheads_chunks import ChunkSelect
from tests.conformance import AttentionExample, ModuleExample

WINDOW, CHUNKS = 5, 5
SELECT = ChunkSelect(WINDOW, WINDOW * CHUNKS, WINDOW * CHUNKS)


def _even(x):
    """Rotary positions need an even width; zeros change nothing."""
    return F.pad(x, (0, x.shape[-1] % 2))


def _fast(q, k, v):
    width, scale = v.shape[-1], q.shape[-1] ** -0.5
    return longheads_attention(*(_even(x) for x in (q, k, v)), SELECT, scale=scale)[..., :width]


def _definition(q, k, v):
    """Query by query: choose chunks, put them one behind the other, rotate them there."""
    b, h, n = q.shape[:3]
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    return torch.stack([_head(*one) for one in zip(*flat, strict=True)]).view(b, h, n, -1)


def _head(q, k, v):
    scale, place, features, out = q.shape[-1] ** -0.5, torch.arange(WINDOW), [], []
    for c in range(len(q) // WINDOW):
        here = slice(c * WINDOW, (c + 1) * WINDOW)
        turned, keys = rope(q[here], place), rope(k[here], place)
        mean = ((turned @ keys.T * scale).softmax(-1) @ v[here]).mean(0)
        features.append((mean @ keys.T * scale).softmax(-1) @ keys)
    for t in range(len(q)):
        rows, whole = list(range(t + 1)), (t + 1) // WINDOW
        if t >= SELECT.start:
            scores = torch.stack(features[1 : whole - 1]) @ q[t]
            best = (scores.topk(CHUNKS - 3).indices + 1).sort().values.tolist()
            chosen = [0, *best, whole - 1]
            rows = [c * WINDOW + x for c in chosen for x in range(WINDOW)]
            rows += range(whole * WINDOW, t + 1)
        keys = rope(k[rows], torch.arange(len(rows)))
        query = rope(q[t : t + 1], torch.tensor([len(rows) - 1]))
        out.append((query @ keys.T * scale).softmax(-1) @ v[rows])
    return torch.cat(out)


def _inputs(dtype):
    x = torch.randn(2, 28, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x.to(dtype),)


EXAMPLES = [
    AttentionExample(
        _fast,
        _definition,
        lengths=((1, 1), (7, 7), (44, 44)),
        value_width=8,
        causal=True,
        bad=(
            (lambda: ChunkSelect(5, 24, 24), "a multiple of window, at least 4 times"),
            (lambda: ChunkSelect(5, 25, 20), "start must be at least length, got 20 and 25"),
            (
                lambda: longheads_attention(torch.randn(1, 1, 2, 4), *torch.randn(2, 1, 1, 3, 4)),
                "as many keys as queries, got 3 and 2",
            ),
        ),
    ),
    ModuleExample(
        lambda: LongHeadsAttention(8, 4, kv_heads=2, select=SELECT),
        _inputs,
        causal=True,
        bad=((lambda: LongHeadsAttention(8, 3), "heads must divide dim"),),
    ),
]
