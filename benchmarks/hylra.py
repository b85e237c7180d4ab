"""HyLRA (arXiv 2602.00777): a planned reuse of selections against an even one, and the cost of a step.

    python -m benchmarks.hylra [--json] [--claim]

The paper's claim: consecutive layers share their critical tokens, and a plan made from a profile beats
evenly spaced reuse with as many full and selecting layers. `--claim` measures both on SmolLM2 and
Python's documentation, each token as if it were decoded over its predecessors (about three minutes); the
profile is taken on another window than the loss. Its cost: O(M D) in full and selecting layers (bits
instead of products with hash codes), O(k D) in reusing ones; O(L^2 C) for the plan.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.timing import row
from regard.core.token_select import TopTokens
from regard.sparse.hylra import LayerReuse, plan, profile
from regard.sparse.hylra_plan import best_reuse
from regard.sparse.hylra_state import ReuseState

from . import main
from .counted import slope
from .smollm2_docs import documents, nll


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536), keep: int = 256
) -> list[dict[str, Any]]:
    """Pairs of query and key of one decoding step in each kind of layer, over M."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    counts: dict[str, list[int]] = {"full layer": [], "selecting layer": [], "reusing layer": []}
    keep = min(keep, sizes[0])
    for m in sizes:
        q = torch.randn(1, 4, 1, 8, generator=generator)
        k = torch.randn(1, 2, m, 8, generator=generator)
        state = ReuseState((-1, -1, 1), (0,), TopTokens(keep))
        found = [state.layout(layer, q, k) for layer in range(3)]
        assert found[0] is None and found[1] is not None and found[2] is not None
        counts["full layer"].append(4 * m)
        # It scores every key before it reads those that it chose.
        counts["selecting layer"].append(4 * m + found[1].listed_pairs())
        counts["reusing layer"].append(found[2].listed_pairs())
    taken = time.perf_counter() - start
    rows = []
    for name, pairs in counts.items():
        # Beyond what is kept, which does not depend on M.
        net = [p - (pairs[0] - 4 * sizes[0] if name == "selecting layer" else 0) for p in pairs]
        stated = "k, M^0" if name == "reusing layer" else "M"
        note = (
            f"pairs of 4 heads grow as M^{slope(sizes, net):.2f} (stated {stated}): "
            f"{pairs[0]:,} to {pairs[-1]:,}; k={keep}"
        )
        rows.append(row(f"{name}, M={sizes[0]}..{sizes[-1]}", taken, None, None, note))
    return rows


def search(layers: tuple[int, ...] = (16, 32, 64, 128)) -> list[dict[str, Any]]:
    """Seconds of the plan's search over L layers with L / 4 resets."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for count in layers:
        overlap = torch.rand(count, count, generator=generator).tolist()
        start = time.perf_counter()
        _, low, total = best_reuse(overlap, count // 4)
        taken = time.perf_counter() - start
        note = f"smallest overlap {low:.2f}, mean {total / count:.2f}"
        rows.append(row(f"search, L={count}", taken, None, None, note))
    return rows


def even(layers: int, full: Sequence[int], selecting: int) -> LayerReuse:
    """Selecting layers evenly spaced over those that are not full, each reused until the next."""
    rest = [layer for layer in range(layers) if layer not in full]
    own = {rest[i * len(rest) // selecting] for i in range(selecting)}
    policy, source = [], -1
    for layer in range(layers):
        source = layer if layer in own else source
        policy.append(-1 if layer in full or layer in own else source)
    return LayerReuse(tuple(policy), tuple(full))


def claim(
    windows: int = 2, length: int = 1024, first: int = 256, keep: int = 64
) -> list[dict[str, Any]]:
    """Loss of SmolLM2 with 4 full, 9 selecting and 17 reusing layers, planned and evenly spaced."""
    model, texts = documents(windows + 1, length)
    *texts, calibration = texts
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, LayerReuse | None]] = [("dense", None)]
    spaced: list[tuple[str, LayerReuse | None]] = []
    # The authors' sizes (chunks of 64, 2048 tokens kept, 64 and 512 of them forced) over 32; and
    # single tokens with nothing forced.
    for chunk, sink, recent in ((2, 2, 16), (1, 0, 0)):
        print(f"  profile in chunks of {chunk}", file=sys.stderr)
        start = time.perf_counter()
        sizes = {"chunk": chunk, "sink": sink, "recent": recent}
        measured = profile(model, calibration, **sizes, keep=keep, steps=length - first)
        made = plan(measured, sparsity=0.87, rho=0.3)
        layers = range(len(made.policy) - 1)
        near = [measured.overlap[i][i + 1] for i in layers]
        note = (
            f"adjacent layers share {min(near):.2f} to {max(near):.2f} of their top {keep} tokens, "
            f"mean {sum(near) / len(near):.2f}; full {list(made.full)}; smallest overlap of the plan "
            f"{made.objective[0]:.2f}, mean {made.objective[1] / len(made.policy):.2f}"
        )
        taken = time.perf_counter() - start
        rows.append(row(f"profile in chunks of {chunk}, and plan", taken, None, None, note))
        cases.append((f"planned, profile in chunks of {chunk}", LayerReuse(made.policy, made.full)))
        if chunk > 1:
            count, selecting = len(made.policy), made.policy.count(-1) - len(made.full)
            first_full = range(len(made.full))
            spaced = [
                ("evenly spaced, first layers full", even(count, first_full, selecting)),
                ("evenly spaced, the plan's layers full", even(count, made.full, selecting)),
            ]
    for name, method in [*cases, *spaced]:
        print(f"  {name}", file=sys.stderr)
        start = time.perf_counter()
        losses = [_loss(model, ids, first, method, keep) for ids in texts]
        each = ", ".join(f"{x:.3f}" for x in losses)
        note = f"{sum(losses) / len(losses):.3f} nats a token (windows: {each})"
        if method is not None:
            own = method.policy.count(-1) - len(method.full)
            note += f"; {len(method.full)} full, {own} selecting, k={keep}"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


def _loss(model: Any, ids: Tensor, first: int, method: LayerReuse | None, keep: int) -> float:
    if method is None:
        return nll(model, ids, first)
    forced = replace(method, selector=TopTokens(keep), teacher_forced=True)
    with regard.patch(model, forced):
        return nll(model, ids, first)


if __name__ == "__main__":
    main((growth, search), {"claim": claim}, doc=__doc__)
