"""LongHeads (arXiv 2402.10685): loss on SmolLM2 with few chunks a query, and the growth of its work.

    python -m benchmarks.longheads [--json] [--model] [--beyond]

The claim: a choice of chunks for every head and token keeps quality with a short span of attention.
`--model` takes 256 of 1,024 tokens (chunks of 32) and compares the same choice at true positions, the
authors' prefill (a token does not see itself), a plain window of 256 and dense attention: a minute.
`--beyond` reads further than SmolLM2's 8,192 trained positions, where only the moved chunks stay at
distances that the model knows: several minutes and 8 GB.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import regard
from regard import Causal, Full, Mask, SlidingWindow
from regard.bench.timing import row
from regard.core import row_blocks
from regard.models import Method
from regard.sparse import longheads_chunks
from regard.sparse.longheads import LongHeads
from regard.sparse.longheads_cache import ChunkCache
from regard.sparse.longheads_chunks import ChunkSelect

from . import main
from .counted import counted, slope
from .smollm2_docs import documents, nll

WINDOW, LENGTH = 32, 256


def _losses(
    methods: tuple[tuple[str, Method | Mask], ...], windows: int, length: int, first: int
) -> list[dict[str, Any]]:
    """Mean loss of each method over windows of text, counted from position `first`."""
    model, ids = documents(windows=windows, length=length)
    rows = []
    for name, method in methods:
        start, losses = time.perf_counter(), []
        for at, window in enumerate(ids, 1):
            print(f"  {name}: window {at} of {windows}", file=sys.stderr)
            with regard.patch(model, method):
                losses.append(nll(model, window, first=first))
        each = ", ".join(f"{x:.3f}" for x in losses)
        note = f"loss {sum(losses) / len(losses):.3f} nats ({each})"
        rows.append(row(f"N={length}: {name}", time.perf_counter() - start, None, None, note))
    return rows


def loss(windows: int = 3) -> list[dict[str, Any]]:
    """SmolLM2 on Python's documentation, N=1024, positions from 256 on."""
    methods = (
        ("dense", Full()),
        (f"LongHeads, {LENGTH} keys in chunks of {WINDOW}", LongHeads(WINDOW, LENGTH, LENGTH)),
        ("the same choice at true positions", LongHeads(WINDOW, LENGTH, LENGTH, remap=False)),
        ("tokens do not see themselves", LongHeads(WINDOW, LENGTH, LENGTH, exclude_self=True)),
        (f"window of {LENGTH}", Causal() & SlidingWindow(LENGTH - 1)),
    )
    return _losses(methods, windows, 1024, LENGTH)


def beyond(length: int = 9216, trained: int = 8192) -> list[dict[str, Any]]:
    """Loss on positions that SmolLM2 was not trained for, with the paper's sizes."""
    methods = (
        ("dense", Full()),
        ("LongHeads, 4096 keys in chunks of 256", LongHeads()),
        ("the same choice at true positions", LongHeads(remap=False)),
    )
    return _losses(methods, 1, length, trained)


@dataclass(frozen=True)
class _Scoring(ChunkSelect):
    """The choice of chunks, which notes how many products of a query and a feature it makes."""

    scored: list[int] = field(default_factory=list)

    def choose(
        self, q: Tensor, features: Tensor, rows: Tensor, *, exclude_self: bool = False
    ) -> Tensor:
        self.scored.append(q.shape[2] * features.shape[2])
        return super().choose(q, features, rows, exclude_self=exclude_self)


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Pairs and scored features of a prefill, and of one more token, chunks of 64, 512 keys a query."""
    start = time.perf_counter()
    whole, scored, steps, features = [], [], [], []
    for n in sizes:
        select = _Scoring(64, 512, 512)
        cache = ChunkCache(select)
        q, k, v = torch.randn(3, 1, 1, n, 4, generator=torch.Generator().manual_seed(0))
        with counted(longheads_chunks, row_blocks) as count:
            cache.attend(q, k, v)
        whole.append(count.pairs)
        scored.append(sum(select.scored))
        with counted(longheads_chunks, row_blocks) as count:
            cache.attend(*(x[:, :, :1] for x in (q, k, v)))
        steps.append(count.pairs)
        features.append(sum(select.scored) - scored[-1])
    # A query reads 512 keys, and scores a feature a chunk; the first 512 rows score none.
    forms = [n * 512 for n in sizes], [(n - 512) * (n // 64) for n in sizes]
    stated = [slope(sizes, form) for form in forms]
    note = (
        f"prefill: pairs grow as N^{slope(sizes, whole):.2f}, scored features N^"
        f"{slope(sizes, scored):.2f} ({scored[-1] / whole[-1]:.2f} of the pairs at {sizes[-1]}); one "
        f"more token reads {', '.join(map(str, steps))} keys and scores "
        f"{', '.join(map(str, features))} (N^{slope(sizes, features):.2f}); stated N n W, "
        f"N^{stated[0]:.2f}, N (N / W), N^{stated[1]:.2f}, and N / W a token, N^1"
    )
    dense = sizes[-1] * (sizes[-1] + 1) / 2
    bound = dense / (whole[-1] + scored[-1])
    name = f"growth over N={sizes[0]}..{sizes[-1]}"
    return [row(name, time.perf_counter() - start, None, bound, note)]


if __name__ == "__main__":
    main((growth,), {"model": loss, "beyond": beyond}, doc=__doc__)
