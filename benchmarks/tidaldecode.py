"""TidalDecode (arXiv 2410.05076): re-selection in the middle, on SmolLM2, and the cost of a step.

    python -m benchmarks.tidaldecode [--json] [--claim] [--time]

The paper's claim: positions chosen early persist through the layers, and choosing again in a middle
layer is necessary and helps. `--claim` measures it as loss of SmolLM2 on Python's documentation, each
token as if it were decoded over its predecessors (about three minutes). Its cost: O(M D) in selecting
layers, O(k D) in the others. `--time` times decoding steps over a cache of 32k keys.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import regard
from regard import BlockLayout, Causal, Mask, attend
from regard.bench.timing import paired, row
from regard.core.select import Selector, choose_blocks
from regard.core.token_select import TopTokens, list_chosen, tokens_layout
from regard.models.select_method import SelectMethod
from regard.sparse.tidaldecode import TidalDecode
from regard.sparse.tidaldecode_state import TidalState

from . import main
from .counted import slope
from .smollm2_docs import documents, nll

HEADS, KV_HEADS, WIDTH = 9, 3, 64


@dataclass(frozen=True)
class RandomTokens(Selector):
    """Sets of ``keep`` random keys, one a row and query head."""

    keep: int
    seed: int = 0

    def select(
        self, q: Tensor, k: Tensor, *, mask: Mask | None = None, state: Any = None
    ) -> BlockLayout:
        mask = Causal() if mask is None else mask
        (b, h, n, _), m = q.shape, k.shape[2]
        generator = torch.Generator().manual_seed(self.seed)
        allowed = mask.dense(n, m).expand(b, 1, n, m)
        scores = torch.rand(b, h, n, m, generator=generator)
        chosen = choose_blocks(scores, allowed, self.keep)
        return tokens_layout(list_chosen([chosen], (b, h, n), q.device), n, m, mask=mask)


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536), top_k: int = 256
) -> list[dict[str, Any]]:
    """Pairs of query and key that one decoding step scores in each kind of layer, over M."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    counts: dict[str, list[int]] = {"selecting layer": [], "sparse layer": []}
    top_k = min(top_k, sizes[0])
    for m in sizes:
        q = torch.randn(1, 4, 1, 8, generator=generator)
        k = torch.randn(1, 2, m, 8, generator=generator)
        state = TidalState(top_k, 0, ())
        # No layout: the layer reads every key, and scores it for its choice.
        counts["selecting layer"].append(4 * m if state.layout(0, q, k) is None else 0)
        sparse = state.layout(1, q, k)
        assert sparse is not None
        counts["sparse layer"].append(sparse.listed_pairs())
    taken = time.perf_counter() - start
    rows = []
    stated = {"selecting layer": "M", "sparse layer": "k, M^0"}
    for name, pairs in counts.items():
        note = (
            f"pairs of 4 heads grow as M^{slope(sizes, pairs):.2f} (stated {stated[name]}): "
            f"{pairs[0]:,} to {pairs[-1]:,}; k={top_k}"
        )
        rows.append(row(f"{name}, M={sizes[0]}..{sizes[-1]}", taken, None, None, note))
    return rows


def claim(windows: int = 2, length: int = 1024, first: int = 256) -> list[dict[str, Any]]:
    """Loss of SmolLM2 with positions shared between layers, teacher-forced, in nats."""
    model, texts = documents(windows, length)

    def tidal(top_k: int, correct: tuple[int, ...], share: str = "head") -> TidalDecode:
        return TidalDecode(top_k, 2, correct, share, share != "head", teacher_forced=True)

    full = regard.Full()
    cases: list[tuple[str, Any]] = [
        ("dense", full),
        ("every layer selects for itself, k=64", SelectMethod(TopTokens(64))),
        ("no correction, k=64", tidal(64, ())),
        ("correction at 9, k=64", tidal(64, (9,))),
        ("correction at 13, k=64", tidal(64, (13,))),
        ("correction at 9, k=128", tidal(128, (9,))),
        ("heads choose together, correction at 13, k=64", tidal(64, (13,), "all")),
        ("heads choose together, corrections at 9, 16, 23, k=64", tidal(64, (9, 16, 23), "all")),
        ("heads choose together, correction at 13, k=128", tidal(128, (13,), "all")),
        ("random sets in every layer, k=64", SelectMethod(RandomTokens(64))),
    ]
    rows = []
    for name, method in cases:
        print(f"  {name}", file=sys.stderr)
        start = time.perf_counter()
        losses = []
        for ids in texts:
            with regard.patch(model, method):
                losses.append(nll(model, ids, first))
        each = ", ".join(f"{x:.3f}" for x in losses)
        note = f"{sum(losses) / len(losses):.3f} nats a token (windows: {each})"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


def step_time(m: int = 32768, layers: int = 30, top_k: int = 256) -> list[dict[str, Any]]:
    """Attention of all layers for one token over a cache of m keys, choosing included."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(layers, 1, HEADS, 1, WIDTH, generator=generator)
    # Four layers' caches in turn: more would only fill memory.
    k, v = torch.randn(2, 4, 1, KV_HEADS, m, WIDTH, generator=generator)
    rows = []
    for share in ("head", "kv"):
        state = TidalState(top_k, 2, (13,), share)

        def ours(state: TidalState = state) -> None:
            state.begin_step()
            for layer in range(layers):
                state.attend(layer, q[layer], k[layer % 4], v[layer % 4])

        def dense() -> None:
            for layer in range(layers):
                attend(q[layer], k[layer % 4], v[layer % 4], mask=Causal())

        taken, theirs = paired(ours, dense)
        # Layers 0, 1, 2 and 13 read everything, two of them score their keys a second time.
        keys = 4 * m + 2 * m / 2 + (layers - 4) * top_k
        note = f"{layers} layers, {top_k} keys shared by {share}, selections at 2 and 13"
        rows.append(row(f"decoding step over M={m}", taken, theirs, layers * m / keys, note))
    return rows


if __name__ == "__main__":
    main((growth,), {"claim": claim, "time": step_time}, doc=__doc__)
