"""Radial Attention: the paper's mask with and without sink and text, and the official blocks."""

from __future__ import annotations

import math

import torch

from regard import attend
from regard.patterns.radial import radial_block_map, radial_block_mask, radial_mask
from tests.conformance import AttentionExample, MaskExample
from tests.core.dense import dense_attention


def _definition(f, s, sink, text):
    total = f * s + text
    out = torch.ones(total, total, dtype=torch.bool)
    for x in range(f * s):
        for y in range(f * s):
            (i, k), (j, place) = divmod(x, s), divmod(y, s)
            d = abs(i - j)
            p = 2 ** math.floor(math.log2(max(d, 1)))
            band = p <= s and abs(k - place) + 1 <= s / p
            diagonal = d % math.ceil(p / s) == 0 and k == place
            out[x, y] = band or diagonal or (sink and j == 0)
    return out


def _example(f, s, sink=True, text=0, rows=None):
    total = f * s + text
    rows = total if rows is None else rows
    mask = radial_mask(f, s, sink=sink, text=text)
    return MaskExample(mask, rows, total, lambda n, m: _definition(f, s, sink, text)[m - n :])


def _fast(q, k, v):
    return attend(q, k, v, mask=radial_mask(k.shape[2] // 4, 4))


def _dense(q, k, v):
    return dense_attention(q, k, v, _definition(k.shape[2] // 4, 4, True, 0)[-q.shape[2] :])[0]


def _blocks(n, m):
    found = radial_block_map(6, 20, text=8, block=8)
    return found.repeat_interleave(8, 0).repeat_interleave(8, 1)


EXAMPLES = [
    _example(9, 6),
    _example(9, 6, sink=False),
    _example(5, 7, text=4),
    _example(20, 3),
    _example(5, 7, text=4, rows=17),
    MaskExample(radial_block_mask(6, 20, text=8, block=8), 128, 128, _blocks),
    AttentionExample(
        _fast,
        _dense,
        lengths=((4, 4), (36, 36), (13, 64)),
        bad=(
            (lambda: radial_mask(0, 4), "frames must be an integer >= 1"),
            (lambda: radial_mask(3, 4, text=-1), "text must be an integer >= 0"),
            (lambda: radial_mask(3, 4).dense(13), "grid of 3 x 4, 12 in all"),
            (lambda: radial_block_mask(3, 100), "no multiple of block=128"),
            (lambda: radial_block_map(3, 200), "do not hold the last frame"),
            (lambda: radial_block_map(3, 128, variant="x"), "must be 'wan' or 'hunyuan'"),  # type: ignore[arg-type]
            (lambda: radial_block_map(3, 128, decay_factor=0.0), "must be positive"),
            (lambda: radial_block_mask(2, 128).dense(128), "made for 256 tokens"),
        ),
    ),
]
