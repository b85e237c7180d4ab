"""HyperAttention (arXiv 2310.05869): what sorting and sampling are worth, and how the work grows.

    python -m benchmarks.hyper [--json] [--only planted|growth] [--smollm2] [--time]

The paper's claims: sorting hashes finds heavy pairs, sampling estimates the rest, both together are
better than either; in a pretrained model the loss grows with the number of layers that are replaced.
Cost: near-linear. `--smollm2` measures the last 5, 15 and all 30 layers of SmolLM2-135M on Python's
documentation, with three seeds (about two minutes). There the loss grows with the layers where drawn
keys in the own block count twice, as in the authors' float32 code; counted once, as in the paper, 15
layers lose more than 30, and single runs differ by a nat. Seconds are those of working a figure out.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from regard import Causal, attend, patch
from regard.bench.timing import paired, row
from regard.sparse import hyper
from regard.sparse.hyper import hyper_attention
from regard.sparse.hyper_method import HyperAttention

from . import main
from .counted import counted, slope
from .smollm2_docs import documents, nll

WIDTH = 64


def clusters(n: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values around `count` planted centres, four heads `(1, 4, n, 64)`."""
    g = torch.Generator().manual_seed(seed)
    head = torch.arange(4)[:, None]
    member = torch.randint(count, (4, n), generator=g)
    centre = torch.nn.functional.normalize(torch.randn(4, count, WIDTH, generator=g), dim=-1)
    noise = torch.randn(2, 4, n, WIDTH, generator=g) * WIDTH**-0.5
    q, k = 7 * (centre[head, member] + noise / 2)
    v = torch.randn(4, count, WIDTH, generator=g)[head, member]
    return q[None], k[None], (v + torch.randn(4, n, WIDTH, generator=g) / 4)[None]


VARIANTS: dict[str, dict[str, Any]] = {
    "sorted blocks and samples": {},
    "unsorted blocks and samples": {"proj": torch.zeros(WIDTH, 1)},
    "sorted blocks only": {"samples": 0},
    "samples only": {"block": 0},
}


@torch.no_grad()
def planted(n: int = 1024, count: int = 32, seeds: int = 5) -> list[dict[str, Any]]:
    """Relative error of the method and of its parts on planted clusters; block and samples 64."""
    rows = []
    for name, change in VARIANTS.items():
        start = time.perf_counter()
        errors, masses = [], []
        for seed in range(seeds):
            q, k, v = clusters(n, count, seed)
            exact, whole = attend(q, k, v, return_lse=True)
            options: dict[str, Any] = {"block": 64, "samples": 64, "min_len": 1, **change}
            generator = torch.Generator().manual_seed(seed)
            out, lse = hyper_attention(q, k, v, generator=generator, return_lse=True, **options)
            errors.append(float((out - exact).norm() / exact.norm()))
            masses.append(float((lse - whole).exp().mean()))
        note = (
            f"relative error {sum(errors) / seeds:.3f} ({min(errors):.3f} to {max(errors):.3f}); "
            f"{sum(masses) / seeds:.2f} of the rows' sums"
        )
        title = f"planted, N={n}, {count} clusters, block 64, 64 samples: {name}"
        rows.append(row(title, time.perf_counter() - start, None, None, note))
    return rows


@torch.no_grad()
def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Pairs that are computed, with the defaults of the authors' code, against all pairs."""
    rows = []
    for causal in (False, True):
        start = time.perf_counter()
        # The default of 4096 would hide the recursion at the smaller sizes.
        min_len, counts = 1024 if causal else 1, []
        for n in sizes:
            q, k, v = torch.randn(3, 1, 1, n, 8, generator=torch.Generator().manual_seed(n))
            with counted(hyper) as count:
                hyper_attention(
                    q, k, v, min_len=min_len, causal=causal, generator=torch.Generator()
                )
            counts.append(count.pairs)
        dense = sizes[-1] * (sizes[-1] + 1) / 2 if causal else sizes[-1] ** 2
        # Causal: half of an exact piece, and for each level half of the queries estimate.
        levels = [math.log2(n / min_len) for n in sizes]
        stated = [min_len / 2 + x * 256 if causal else 512 for x in levels]
        shares = [c / n / s for c, n, s in zip(counts, sizes, stated, strict=True)]
        whole = [n * s for n, s in zip(sizes, stated, strict=True)]
        form = "min_len / 2 + log2(N / min_len) 512 / 2" if causal else "block + samples"
        note = (
            f"pairs grow as N^{slope(sizes, counts):.2f} (stated form: N^{slope(sizes, whole):.2f}); "
            f"{counts[0] / sizes[0]:.0f} to {counts[-1] / sizes[-1]:.0f} a query, "
            f"{shares[0]:.2f} to {shares[-1]:.2f} of {form}; "
            f"{dense / counts[-1]:.1f} times fewer than dense at the end"
        )
        name = f"growth over N={sizes[0]}..{sizes[-1]}, block 256, 256 samples: "
        name += f"causal, min_len {min_len}" if causal else "whole"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


def smollm2(windows: int = 1, seeds: int = 3) -> list[dict[str, Any]]:
    """Loss of SmolLM2 with the last layers replaced; block 64, 64 samples, exact up to 128 tokens."""
    model, texts = documents(windows)
    start = time.perf_counter()
    dense = sum(nll(model, ids) for ids in texts) / windows
    note = f"{dense:.3f} nats a token over {windows} windows of 1024"
    rows = [row("SmolLM2, dense", time.perf_counter() - start, None, None, note)]
    for exclude_own in (True, False):
        for count in (5, 15, 30):
            start = time.perf_counter()
            losses = []
            for seed in range(seeds):
                method = HyperAttention(64, 64, min_len=128, seed=seed, exclude_own=exclude_own)
                with patch(model, method, layers=range(30 - count, 30)):
                    losses.append(sum(nll(model, ids) for ids in texts) / windows)
            note = f"{sum(losses) / seeds:.3f} nats ({', '.join(f'{x:.2f}' for x in losses)})"
            form = "own block counted once" if exclude_own else "twice, as the float32 code"
            name = f"SmolLM2, last {count} layers, {seeds} seeds: {form}"
            rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


@torch.no_grad()
def seconds(n: int = 16384) -> list[dict[str, Any]]:
    """Forward pass of one layer against exact attention, four heads of 64."""
    rows = []
    for causal in (False, True):
        g = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, 4, n, WIDTH, generator=g)
        mask = Causal() if causal else None
        with counted(hyper) as count:
            hyper_attention(q, k, v, causal=causal, generator=g)
        dense = 4 * (n * (n + 1) / 2 if causal else n * n)
        ours, theirs = paired(
            lambda q=q, k=k, v=v, c=causal: hyper_attention(
                q, k, v, causal=c, generator=torch.Generator().manual_seed(0)
            ),
            lambda q=q, k=k, v=v, mask=mask: attend(q, k, v, mask=mask),
            repeats=3,
        )
        name = f"forward, N={n}: {'causal' if causal else 'whole'}"
        rows.append(row(name, ours, theirs, dense / count.pairs, "the authors' defaults"))
    return rows


if __name__ == "__main__":
    main((planted, growth), {"smollm2": smollm2, "time": seconds}, doc=__doc__)
