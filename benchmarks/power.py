"""PowerAttention (arXiv 2503.03588): receptive fields, cost, and passkey retrieval.

    python -m benchmarks.power [--json] [--train]

The paper's claim: with blocks at power-of-two distances the receptive field grows exponentially with
the layers, where a sliding window of equal cost grows by a constant. Its cost: O(N (W + log(N / c)))
blocks of c tokens. `--train` trains two small models from scratch, one with each pattern, and asks
both for a passkey at every place (about two minutes). Seconds are those of working a figure out, of
training in the last rows.
"""

from __future__ import annotations

import math
import time
from typing import Any

from regard import Causal, Mask, Sinks, SlidingWindow
from regard.bench.timing import row
from regard.core.reach import layers_to_reach, receptive_field
from regard.patterns.power import power_mask

from . import main, power_passkey


def reach(blocks: int = 128, layers: int = 6) -> list[dict[str, Any]]:
    """Receptive field of the last of 128 blocks (32,768 tokens) with the paper's sizes."""
    window = Causal() & SlidingWindow(8)
    patterns = (
        ("sliding window of 9 blocks and a sink", window, window | Causal() & Sinks(1)),
        ("PowerAttention, W=5 and a sink", power_mask(1, 5, 0), power_mask(1, 5, 1)),
        ("powers alone, W=1, no sink", power_mask(1, 1, 0), power_mask(1, 1, 0)),
    )
    rows = []
    for name, local, mask in patterns:
        start = time.perf_counter()
        # One token a block: the graph of the blocks. The sink is left out of the reach, which it
        # widens by the same one block for all.
        counts = receptive_field(local.dense(blocks), layers)[:, -1].sum(-1).tolist()
        graph = mask.dense(blocks)
        depth = layers_to_reach(graph, Causal().dense(blocks))
        note = (
            f"{', '.join(map(str, counts))} blocks after 1..{layers} layers; all of {blocks} for "
            f"every block after {depth}; at most {int(graph.sum(-1).max())} read by a row"
        )
        rows.append(row(f"reach: {name}", time.perf_counter() - start, None, None, note))
    return rows


def sparsity(n: int = 32768) -> list[dict[str, Any]]:
    """Blocks and pairs of the paper's setting, c=256, W=5, one sink, at 32,768 tokens."""
    start = time.perf_counter()
    mask = power_mask()
    layout = mask.layout(n, n, mask.block)
    causal = Causal().layout(n, n, mask.block)
    most = int(layout.counts.max())
    note = (
        f"at most {most} of {layout.key_blocks} blocks a row, {1 - layout.density:.3f} of all "
        f"blocks left out (the paper's 0.94), {1 - layout.density / causal.density:.3f} of causal ones"
    )
    bound = causal.density / layout.density
    return [row(f"sparsity, N={n}", time.perf_counter() - start, None, bound, note)]


def growth(
    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536), block: int = 64
) -> list[dict[str, Any]]:
    """Listed pairs of layouts over N: the slope of log over log, against the stated form."""
    start = time.perf_counter()
    mask = power_mask(block)
    pairs = [mask.layout(n, n, block).listed_pairs() for n in sizes]
    slope = math.log(pairs[-1] / pairs[0]) / math.log(sizes[-1] / sizes[0])
    stated = [n * block * (mask.window + math.log2(n / block)) for n in sizes]
    shares = [p / s for p, s in zip(pairs, stated, strict=True)]
    note = f"pairs grow as N^{slope:.2f}; over N c (W + log2(N/c)): {shares[0]:.2f} to {shares[-1]:.2f}"
    name = f"growth over N={sizes[0]}..{sizes[-1]}, c={block}"
    return [row(name, time.perf_counter() - start, None, None, note)]


def passkey(
    n: int = 128, block: int = 4, layers: int = 3, steps: int = 600, trials: int = 32
) -> list[dict[str, Any]]:
    """Train a small model with each pattern and ask for a passkey at every place."""
    power = power_mask(block, 2, 1)
    keys = int(power.dense(n).sum(-1).max())
    patterns: tuple[tuple[str, Mask], ...] = (
        ("PowerAttention, W=2 and a sink", power),
        (f"sliding window of {keys} keys", Causal() & SlidingWindow(keys - 1)),
    )
    rows = []
    for name, mask in patterns:
        start = time.perf_counter()
        model = power_passkey.train(mask, n, layers, steps)
        taken = time.perf_counter() - start
        right = power_passkey.accuracy(model, n, trials)
        inside = receptive_field(mask.dense(n), layers)[-1, -1, : n - 1]
        note = (
            f"{float(right.mean()):.2f} right over all depths; {float(right[inside].mean()):.2f} on "
            f"the {float(inside.float().mean()):.0%} of places within reach, "
            f"{float(right[~inside].mean()):.2f} beyond (chance {1 / power_passkey.KEYS:.2f}); "
            f"{mask.density(n) * n:.0f} keys a row, at most {keys}"
        )
        rows.append(row(f"passkey, N={n}, {layers} layers: {name}", taken, None, None, note))
    return rows


if __name__ == "__main__":
    main((reach, sparsity, growth), {"train": passkey}, doc=__doc__)
