"""SeerAttention (arXiv 2410.13276): a learned gate against heuristic block scores, and its work.

    python -m benchmarks.seer [--json] [--train] [--only growth|distil]

The paper's claim: at equal blocks a gate that was distilled from the model's own attention keeps more
of it than scores from pooled keys. `--train` distils gates for three layers of SmolLM2 from four
windows and tries them on a fifth (about a minute): the share of the attention mass that 4 of at most
32 blocks keep, a query's own block and the one before among them. Cost: O((N / b)^2 d_g) for the gate
and O(N D) for pooling, against O(N^2 D) for attention. Seconds are those of working a figure out.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import Causal
from regard.bench.timing import row
from regard.core.layout import BlockLayout
from regard.core.select import block_allowed, choose_blocks, chosen_layout, recall
from regard.models.calls import AttentionCall
from regard.sparse.generic import BlockTopK, ExactTopK
from regard.sparse.seer import SeerGate
from regard.sparse.seer_distil import distil as train_gate
from regard.sparse.seer_method import Seer, gate_for, lessons

from . import main
from .counted import slope
from .smollm2_docs import documents, nll

BLOCK, KEEP, RECENT = 32, 4, 2
LAYERS = (5, 15, 25)


def _layout(scores: Tensor, n: int) -> BlockLayout:
    allowed = block_allowed(Causal(), n, n, BLOCK)
    chosen = choose_blocks(scores, allowed, KEEP, recent=RECENT)
    return chosen_layout(chosen, n, n, BLOCK)


class _Kept:
    """Mass that each way of choosing the same number of blocks keeps, in every watched layer."""

    def __init__(self, gates: dict[int, SeerGate]) -> None:
        self.seer = Seer(gates, keep=KEEP)
        self.mass: dict[int, dict[str, float]] = {}

    def attention(self, call: AttentionCall, out: Tensor) -> None:
        n, blocks = call.n, -(-call.n // BLOCK)
        options: dict[str, Any] = {"sinks": 0, "recent": RECENT, "share": "head"}
        pooled = BlockTopK(KEEP, BLOCK, summary="mean", **options)
        oracle = ExactTopK(KEEP, BLOCK, **options)
        generator = torch.Generator().manual_seed(call.layer)
        chance = torch.rand(1, call.q.shape[1], blocks, blocks, generator=generator)
        layouts = {
            "gate": _layout(self.seer.logits(call), n),
            "oracle": oracle.select(call.q, call.k),
            "mean-pooled keys": pooled.select(call.q, call.k),
            "random": _layout(chance, n),
        }
        self.mass[call.layer] = {
            name: float(recall(call.q, call.k, layout, scale=call.scale).mean())
            for name, layout in layouts.items()
        }

    def result(self) -> dict[int, dict[str, float]]:
        return self.mass


def _report(layer: int, step: int, steps: int, loss: float) -> None:
    if step % 50 == 0 or step == steps - 1:
        print(f"layer {layer}, step {step} of {steps}: loss {loss:.5f}", file=sys.stderr)


def distil(
    steps: int = 300, windows: int = 4, length: int = 1024, gate_dim: int = 64
) -> list[dict[str, Any]]:
    """Distil gates of SmolLM2's layers 5, 15 and 25 and compare what they keep (about a minute)."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model, ids = documents(windows + 1, length)
    gates, courses = {}, []
    for layer, course in lessons(model, ids[:-1], LAYERS, BLOCK).items():
        gate = gates[layer] = gate_for(model, block=BLOCK, gate_dim=gate_dim)
        losses = train_gate(
            gate,
            course,
            steps=steps,
            progress=lambda step, loss, layer=layer: _report(layer, step, steps, loss),
        )
        first, last = (sum(x) / len(x) for x in (losses[:windows], losses[-windows:]))
        courses.append(f"{layer}: {first:.5f} to {last:.5f}")
    rows = [
        row(
            "distillation loss by layer",
            time.perf_counter() - start,
            None,
            None,
            "; ".join(courses),
        )
    ]
    start = time.perf_counter()
    with torch.no_grad(), regard.watch(model, _Kept(gates), layers=LAYERS) as seen:
        nll(model, ids[-1])
    taken = time.perf_counter() - start
    kept = seen.result()
    for name in kept[LAYERS[0]]:
        shares = "/".join(f"{kept[layer][name]:.3f}" for layer in LAYERS)
        note = f"{shares} of the mass in layers {'/'.join(map(str, LAYERS))}"
        rows.append(
            row(f"{KEEP} of at most {length // BLOCK} blocks: {name}", taken, None, None, note)
        )
    return rows


def work(sizes: tuple[int, ...], block: int = 64, width: int = 64) -> list[int]:
    """Floating-point operations of a gate's products, one head, for prompts of these lengths."""
    gate = SeerGate(1, 1, width, block=block, gate_dim=width)
    flops = []
    for n in sizes:
        x = torch.zeros(1, 1, n, width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            gate(x, x)
        flops.append(counter.get_total_flops())
    return flops


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536), block: int = 64
) -> list[dict[str, Any]]:
    """Counted work of the gate over N, against that of dense causal attention."""
    start = time.perf_counter()
    width = 64
    flops = work(sizes, block, width)
    ends = [math.log2(b / a) for a, b in ((flops[0], flops[1]), (flops[-2], flops[-1]))]
    blocks = [n // block for n in sizes]
    # Two products of width d_g a pair of blocks, and the projection of every block's pooled keys.
    stated = [2 * c * c * width + 2 * c * 3 * width * width for c in blocks]
    shares = [f / s for f, s in zip(flops, stated, strict=True)]
    dense = [2 * n * n * width for n in sizes]
    part = [f / d for f, d in zip(flops, dense, strict=True)]
    note = (
        f"the gate's products grow as N^{slope(sizes, flops):.2f} (stated (N/b)^2 d_g and projection: "
        f"N^{slope(sizes, stated):.2f}), by 2^{ends[0]:.2f} at first, 2^{ends[1]:.2f} at last a "
        f"doubling; over the stated form {min(shares):.2f} to {max(shares):.2f}; {part[-1]:.1e} of "
        f"dense attention's at N={sizes[-1]} "
        f"(1/b^2 = {block**-2:.1e})"
    )
    name = f"growth over N={sizes[0]}..{sizes[-1]}, b={block}"
    return [row(name, time.perf_counter() - start, None, None, note)]


if __name__ == "__main__":
    main((growth,), {"train": distil}, doc=__doc__)
