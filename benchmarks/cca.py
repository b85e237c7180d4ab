"""CCA-Attention (arXiv 2412.12465): what pooling old context costs, saves and loses.

    python -m benchmarks.cca [--json] [--smollm2] [--train]

The paper's claims: pooling a group by what its last token attends to is better than its mean or
maximum; cost O(N (N / g + s + g)) and M / g + s + g cached keys. Without fine-tuning the model is
clearly worse than dense: the paper fine-tunes for 1000 steps. `--smollm2` measures the loss of
SmolLM2-135M, which has never seen a core token, on Python's documentation (about two minutes).
`--train` shows a small decoder losing a recall task when its attention is exchanged, and learning it
again in 100 steps (about a minute). Seconds are those of working a figure out, of training in the last
rows.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from regard import Causal, attend, patch
from regard.bench.timing import paired, row
from regard.sparse.cca import CCACache, cca_attention
from regard.sparse.cca_method import CCA
from regard.sparse.cca_parts import CoreTokens, LocalTokens

from . import main, tiny_recall
from .counted import slope
from .smollm2_docs import documents, nll


def pairs(n: int, group: int, window: int) -> int:
    """Pairs of a query and a core token or a key, from the layouts that `attend` would be given."""
    cores = max(0, n - window) // group
    count = LocalTokens(group, window).layout(n, n, 64).allowed_pairs()
    if cores:
        count += CoreTokens(group, window, n - cores).layout(n, cores, 64).allowed_pairs()
    return count


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
    group: int = 16,
    window: int = 1024,
) -> list[dict[str, Any]]:
    """Pairs over N against the form `(N - s)^2 / 2g + N s`, and against causal attention's."""
    start = time.perf_counter()
    counts = [pairs(n, group, window) for n in sizes]
    stated = [
        window**2 / 2 + (n - window) * ((n - window) / (2 * group) + window + (group - 1) / 2)
        for n in sizes
    ]
    shares = [c / s for c, s in zip(counts, stated, strict=True)]
    saved = sizes[-1] * (sizes[-1] + 1) / 2 / counts[-1]
    note = (
        f"pairs over s^2/2 + (N-s)((N-s)/2g + s + (g-1)/2): {shares[0]:.3f} to {shares[-1]:.3f}; "
        f"pairs grow as N^{slope(sizes, counts):.2f} (stated form: N^{slope(sizes, stated):.2f}), as "
        f"N^{slope(sizes[-2:], counts[-2:]):.2f} at the last doubling; {saved:.1f} times fewer than "
        "causal attention"
    )
    name = f"growth over N={sizes[0]}..{sizes[-1]}, g={group}, s={window}"
    return [row(name, time.perf_counter() - start, None, None, note)]


def cache(
    sizes: tuple[int, ...] = (4096, 16384, 65536, 131072), group: int = 16, window: int = 1024
) -> list[dict[str, Any]]:
    """Entries that a cache holds after N tokens; the paper says 93 % less at 128k."""
    rows = []
    for n in sizes:
        start = time.perf_counter()
        held = CCACache(group, window)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for step in range(0, n, 2048):
                x = torch.randn(1, 1, min(2048, n - step), 8, generator=g)
                held.attend(x, x, x)
        cores, local = held.entries
        note = f"{cores} core tokens and {local} keys instead of {n}: {1 - (cores + local) / n:.1%} less"
        name = f"cache, N={n}, g={group}, s={window}"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


def seconds(n: int = 16384, group: int = 16, window: int = 1024) -> list[dict[str, Any]]:
    """Forward pass of one layer against causal attention."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, 64, generator=g) for _ in range(3))
    ours, theirs = paired(
        lambda: cca_attention(q, k, v, group, window),
        lambda: attend(q, k, v, mask=Causal()),
        repeats=3,
    )
    bound = n * (n + 1) / 2 / pairs(n, group, window)
    name = f"forward, N={n}, g={group}, s={window}"
    return [row(name, ours, theirs, bound, "against regard's causal attention; 4 heads of 64")]


def smollm2(windows: int = 3, group: int = 8, window: int = 256) -> list[dict[str, Any]]:
    """Loss of SmolLM2 without fine-tuning, by the way of pooling."""
    model, texts = documents(windows)
    rows = []
    kinds: list[tuple[str, CCA | None]] = [
        ("dense", None),
        ("g=1", CCA(1, window)),
        *((f"pooled by {pool}", CCA(group, window, pool)) for pool in ("cca", "mean", "max")),
    ]
    for name, method in kinds:
        start = time.perf_counter()
        losses = []
        for ids in texts:
            if method is None:
                losses.append(nll(model, ids))
            else:
                with patch(model, method):
                    losses.append(nll(model, ids))
        note = f"{sum(losses) / len(losses):.3f} nats ({', '.join(f'{x:.2f}' for x in losses)})"
        title = f"SmolLM2, {windows} windows of 1024, g={group}, s={window}: {name}"
        rows.append(row(title, time.perf_counter() - start, None, None, note))
    return rows


def tune(
    group: int = 8, window: int = 8, steps: int = 300, more: int = 100
) -> list[dict[str, Any]]:
    """Exchange the attention of a trained decoder, then fine-tune it."""

    def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cca_attention(q, k, v, group, window)

    task, rows = tiny_recall.Recall(), []
    start = time.perf_counter()
    model = tiny_recall.train(tiny_recall.full, task=task, steps=steps)
    found = [("trained and asked with full attention", tiny_recall.accuracy(model, task))]
    model.attend_with(lambda layer: pooled)
    found.append(("then asked with CCA", tiny_recall.accuracy(model, task)))
    tiny_recall.train(model=model, task=task, steps=more, seed=1, rate=1e-3)
    found.append((f"and after {more} steps of fine-tuning", tiny_recall.accuracy(model, task)))
    for name, share in found:
        note = f"{share:.1%} right, g={group}, s={window} (chance {1 / tiny_recall.VALUES:.1%})"
        rows.append(row(f"recall: {name}", time.perf_counter() - start, None, None, note))
    return rows


if __name__ == "__main__":
    main((growth, cache), {"smollm2": smollm2, "train": tune, "time": seconds}, doc=__doc__)
