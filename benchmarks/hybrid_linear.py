"""Hybrid linear attention (arXiv 2507.06457): recall against the share of full layers, and the cache.

    python -m benchmarks.hybrid_linear [--json] [--only growth|cache]
    python -m benchmarks.hybrid_linear --train --only train    # two mixers, two layers
    python -m benchmarks.hybrid_linear --study --only all_mixers    # five patterns; draws the plot

The paper's claims: a few full layers bring recall back while the loss of the language model hardly
moves, and the best mixer alone need not make the best hybrid. Six mixers are trained alone and with
full layers in between, on recall of pairs and on the text of Python's help
(benchmarks/hybrid_linear_study.py). Full layers beside linear ones have no rotary positions, with which
recall takes more steps to learn than are spent here; a stack of full layers alone has them. `growth`
counts operations of a layer over the tokens, `cache` the bytes of a stack's cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.timing import row
from regard.linear import hybrid_linear_full
from regard.linear.hybrid_linear import TokenMixer
from regard.linear.hybrid_linear_full import FullAttention
from regard.linear.hybrid_linear_kinds import KINDS
from regard.linear.hybrid_linear_stack import HybridStack
from regard.report.pictures import ACCENT, PAPER, png

from . import main
from .counted import counted, slope
from .hybrid_linear_study import MIXERS, PATTERNS, Recall, Result, study

PICTURE = Path(__file__).parent.parent / "docs" / "hybrid_linear.png"
# Told apart without colour vision as well; the first is the report's.
COLOURS = (ACCENT, "#c2571a", "#3c8d5a", "#7a4fa3", "#b08900", "#333f4d")


@torch.no_grad()
def growth(sizes: Sequence[int] = (256, 512, 1024, 2048)) -> list[dict[str, Any]]:
    """Operations of matrix products of every mixer over N: the slope of log over log."""
    rows = []
    for kind in (*KINDS, "full"):
        torch.manual_seed(0)
        layer = FullAttention(64, 2) if kind == "full" else TokenMixer(kind, 64, 2)
        start, work = time.perf_counter(), []
        for n in sizes:
            x = torch.randn(1, n, 64, generator=torch.Generator().manual_seed(0))
            with FlopCounterMode(display=False) as counter, counted(hybrid_linear_full) as count:
                layer(x)
            # Two products of a pair; the counter does not see into fused attention.
            pairs = count.pairs * 4 * getattr(layer, "width", 0)
            work.append(counter.get_total_flops() + pairs)
        taken = time.perf_counter() - start
        note = (
            f"operations grow as N^{slope(sizes, work):.3f}; {work[-1] / sizes[-1]:.0f} a token at "
            f"N={sizes[-1]}"
        )
        rows.append(row(f"growth over N={sizes[0]}..{sizes[-1]}: {kind}", taken, note=note))
    return rows


def cache(lengths: Sequence[int] = (1024, 65536)) -> list[dict[str, Any]]:
    """Bytes of the cache of four layers of Gated DeltaNet and full attention."""
    rows = []
    for pattern in PATTERNS:
        start = time.perf_counter()
        torch.manual_seed(0)
        stack = HybridStack(256, 4, pattern, "gdn")
        for n in lengths:
            held, full = stack.cache_bytes(n), HybridStack(256, 4, "FFFF").cache_bytes(n)
            note = (
                f"{held.state} bytes of state and {held.kv} of keys and values, together 1 / "
                f"{full.total / held.total:.2f} of full attention's; keys and values are "
                f"{full.kv / held.kv:.2f} times fewer"
                if held.kv
                else f"{held.state} bytes of state at any length"
            )
            taken = time.perf_counter() - start
            rows.append(row(f"{pattern} after {n} tokens", taken, note=note))
    return rows


def plot(results: Sequence[Result]) -> bytes:
    """Recall and loss over the share of full layers, a line a mixer, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    names = [name for name in dict.fromkeys(r.linear for r in results) if name != "full"]
    for panel, title in zip(panels, ("recall", "loss, nats a character"), strict=True):
        for at, name in enumerate(names):
            line = sorted((r.share, r) for r in results if r.linear == name)
            heights = [r.recall if title == "recall" else r.loss for _, r in line]
            shares = [share for share, _ in line]
            colour = COLOURS[at % len(COLOURS)]
            panel.plot(shares, heights, marker=".", color=colour, label=name)
        for r in results:
            if r.linear == "full":
                height = r.recall if title == "recall" else r.loss
                panel.plot(1.0, height, "x", color="black", label="full attention")
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("share of full layers", fontsize=8)
        panel.set_ylim(bottom=0)
        panel.grid(color=PAPER)
        panel.tick_params(labelsize=7, length=2)
        for edge in panel.spines.values():
            edge.set_color("#9aa5b1")
    panels[0].legend(fontsize=7, frameon=False)
    return png(figure)


def _rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a model, and what the claims say of all of them."""
    rows = []
    for r in results:
        note = f"share {r.share:.2f}: recall {r.recall:.2f}, loss {r.loss:.3f} nats a character"
        rows.append(row(f"{r.linear} {r.pattern}", r.seconds, note=note))
    mixed = [r for r in results if r.linear != "full"]
    alone = {r.linear: r for r in mixed if r.share == 0}
    hybrids = [r for r in mixed if r.share > 0]
    if not alone or not hybrids:
        return rows
    gains = [
        max(r.recall for r in hybrids if r.linear == name) - alone[name].recall for name in alone
    ]
    moves = [abs(r.loss / alone[r.linear].loss - 1) for r in hybrids]
    best = max(alone.values(), key=lambda r: r.recall), max(hybrids, key=lambda r: r.recall)
    note = (
        f"full layers add {min(gains):.2f} to {max(gains):.2f} of recall and move the loss by at most "
        f"{max(moves):.1%}; best recall alone {best[0].linear}, of the hybrids {best[1].linear}"
    )
    return [*rows, row("all", sum(r.seconds for r in results), note=note)]


def train() -> list[dict[str, Any]]:
    """Train two mixers alone and with a full layer, in stacks of two layers, on both tasks."""
    results = study(
        ("hgrn", "gdn"), ("LL", "LF"), recall=Recall(8, 40), recall_steps=1200, text_steps=120
    )
    return _rows(results)


def all_mixers() -> list[dict[str, Any]]:
    """Train all six mixers in five patterns on both tasks, and draw docs/hybrid_linear.png."""
    results = study(MIXERS, PATTERNS, recall=Recall(8, 40), recall_steps=1200, text_steps=200)
    PICTURE.write_bytes(plot(results))
    return _rows(results)


if __name__ == "__main__":
    main((growth, cache), {"train": train, "study": all_mixers}, doc=__doc__)
