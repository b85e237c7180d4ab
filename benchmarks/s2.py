"""S2-Attention (arXiv 2407.17678): what each head keeps, what all see together, and the cost.

    python -m benchmarks.s2 [--json]

The paper's claim, with the sizes of the deployed Phi-3-small (c=64, w=16, v=8, 32 heads, 8 key heads):
every head reads and caches a small part of the context, together they see all of it. Its cost, for
each head: O(N (w + N / (v c)) c), still quadratic but with the constant 1 / v. Seconds are those of
working a figure out.
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch

from regard import Causal
from regard.bench.timing import row
from regard.patterns.s2 import S2, is_kv_efficient, s2_kv_keep, s2_mask

from . import main

SIZES: dict[str, Any] = {"block": 64, "local_blocks": 16, "vert_stride": 8, "kv_heads": 8}


def _graph(mask: S2, blocks: int) -> torch.Tensor:
    """Blocks read by each key head, bool `(Hk, blocks, blocks)`."""
    at = torch.arange(blocks)
    return mask.keeps(at[:, None], at, torch.arange(mask.shards)[:, None, None])


def share(n: int = 32768) -> list[dict[str, Any]]:
    """Share of the causal blocks, blocks of the last row and cache of a head; the heads' union."""
    start = time.perf_counter()
    mask = s2_mask(32, **SIZES)
    graph = _graph(mask, n // 64)
    causal = torch.ones_like(graph[0]).tril()
    kept = graph.sum((-2, -1)) / causal.sum()
    last = graph[:, -1].sum(-1)
    union = bool((graph.any(0) == causal).all())
    cached = torch.stack([s2_kv_keep(mask, h, torch.arange(n), n - 1).sum() for h in range(8)])
    note = (
        f"each head keeps {float(kept.min()):.1%} to {float(kept.max()):.1%} of the causal blocks, "
        f"{int(last.min())} to {int(last.max())} of {n // 64} in the last row, a cache "
        f"{n / float(cached.double().mean()):.1f} times smaller; union of the heads "
        f"{'complete' if union else 'INCOMPLETE'}; blocks dropped never come back: "
        f"{is_kv_efficient(graph)}"
    )
    bound = float(1 / kept.mean())
    return [row(f"Phi-3-small's pattern, N={n}", time.perf_counter() - start, None, bound, note)]


def coverage(blocks: int = 512) -> list[dict[str, Any]]:
    """Settings whose heads leave blocks unseen although every head has its shard, and one mended."""
    rows = []
    for heads, kv_heads, stride in ((4, 2, 4), (2, 2, 6), (4, 2, 2)):
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            mask = s2_mask(heads, vert_stride=stride, kv_heads=kv_heads)
        graph = _graph(mask, blocks).any(0)
        covered = float(graph.sum() / torch.ones_like(graph).tril().sum())
        name = f"coverage, H={heads}, Hk={kv_heads}, v={stride}, step {mask.step}"
        note = (
            f"{covered:.0%} of the causal blocks are seen by a head; residues missing: "
            f"{len(mask.missing)} of {stride}; {'warned' if seen else 'no warning'}"
        )
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


def growth(
    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Listed pairs of a head's layout over N: the slope, and the share of causal attention."""
    start = time.perf_counter()
    # Head 0 of a pattern for one key head of 32: all heads grow alike.
    mask = s2_mask(32, homo=True, **{**SIZES, "kv_heads": 32})
    pairs = [mask.layout(n, n, 64).listed_pairs() for n in sizes]
    slope = math.log(pairs[-1] / pairs[0]) / math.log(sizes[-1] / sizes[0])
    late = math.log(pairs[-1] / pairs[-2]) / math.log(sizes[-1] / sizes[-2])
    shares = [
        p / Causal().layout(n, n, 64).listed_pairs() for p, n in zip(pairs, sizes, strict=True)
    ]
    stated = [n * (16 + n / (8 * 64) / 2) * 64 for n in sizes]
    note = (
        f"pairs grow as N^{slope:.2f}, as N^{late:.2f} at the end (stated: towards 2); share of causal "
        f"{shares[0]:.2f} falls to {shares[-1]:.3f} (towards 1/8); over N c (w + N / (2 v c)) at the "
        f"end: {pairs[-1] / stated[-1]:.2f}"
    )
    name = f"growth over N={sizes[0]}..{sizes[-1]}"
    return [row(name, time.perf_counter() - start, None, None, note)]


if __name__ == "__main__":
    main((share, coverage, growth), doc=__doc__)
