"""LightNet (arXiv 2405.21022): independence of the scan's order, counted work, and learning on grids.

    python -m benchmarks.lightnet [--json] [--only scan_order|growth] [--train]

The paper's claim: with an additive decay one scan serves any number of axes, because what all tokens
see together does not depend on their order; with a multiplicative decay it does, so that such models
scan an image in several directions. Its cost: O(N K V) for all tokens at once, and for the causal
form O(N (c K + c V + K V)). `--train` trains two small models, with and without positions, to tell
where on a grid one mark lies from another (about a minute).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.timing import row
from regard.linear.lightnet import lightnet_attention
from regard.linear.lightnet_model import LightNetModel
from regard.linear.lightning2 import decay_slopes, lightning_attention

from . import main
from .counted import slope

NOISE, CLASSES = 6, 4


def _inputs(n: int, heads: int = 2, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, heads, n, width, generator=torch.Generator().manual_seed(0))
    return F.silu(q), k, v


def scan_order(sides: Sequence[int] = (4, 32)) -> list[dict[str, Any]]:
    """Scan square grids by rows and by columns, undo the order, and compare the outputs."""
    rows = []
    for side in sides:
        q, k, v = _inputs(side * side)
        columns = torch.arange(side * side).view(side, side).T.flatten()
        back = columns.argsort()
        forms = (
            ("LightNet", lambda q, k, v: lightnet_attention(q, k, v, causal=False, scale=1.0)),
            (
                "a decay a head, both directions of one scan",
                lambda q, k, v: lightning_attention(q, k, v, decay_slopes(2), causal=False),
            ),
        )
        for name, form in forms:
            start = time.perf_counter()
            by_rows = form(q, k, v)
            by_columns = form(q[:, :, columns], k[:, :, columns], v[:, :, columns])[:, :, back]
            taken = time.perf_counter() - start
            gap = float((by_rows - by_columns).abs().max())
            note = (
                f"scanning by columns changes the output by {gap:.1e}, of a size up to "
                f"{float(by_rows.abs().max()):.1f}"
            )
            rows.append(row(f"{side}x{side} grid: {name}", taken, note=note))
    return rows


def growth(sizes: Sequence[int] = (512, 1024, 2048, 4096, 8192)) -> list[dict[str, Any]]:
    """Operations of matrix products over N: the slope of log over log."""
    rows = []
    for name, causal in (("all tokens in one pass", False), ("causal, chunks of 64", True)):
        start = time.perf_counter()
        work = []
        for n in sizes:
            with FlopCounterMode(display=False) as counter:
                lightnet_attention(*_inputs(n), causal=causal)
            work.append(counter.get_total_flops())
        taken = time.perf_counter() - start
        note = (
            f"operations grow as N^{slope(sizes, work):.3f}; a token and head takes "
            f"{work[0] / sizes[0] / 2:.0f} at N={sizes[0]}, {work[-1] / sizes[-1] / 2:.0f} at "
            f"N={sizes[-1]}"
        )
        rows.append(row(f"growth over N={sizes[0]}..{sizes[-1]}: {name}", taken, note=note))
    return rows


class Pointer(nn.Module):
    """Marks on a grid to one of four directions, by LightNet over all cells and their mean."""

    def __init__(self, positions: bool, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(NOISE + 2, dim)
        self.body = LightNetModel(
            dim, 2, 2, gate_rank=16, axes=2, causal=False, positions=positions
        )
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, cells: Tensor) -> Tensor:
        """Scores `(B, 4)` of cells `(B, side, side)`."""
        found = self.body(self.embed(cells.flatten(1)), cells.shape[1:])
        scores: Tensor = self.head(found.mean(1))
        return scores


def sample(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grids `(count, side, side)` of noise with two marks in different rows and columns.

    The class says whether the second mark lies below the first, and whether to its right.
    """
    cells = torch.randint(NOISE, (count, side, side), generator=generator)
    first = torch.randint(side, (count, 2), generator=generator)
    step = torch.randint(1, side, (count, 2), generator=generator)
    second = (first + step) % side
    every = torch.arange(count)
    cells[every, first[:, 0], first[:, 1]] = NOISE
    cells[every, second[:, 0], second[:, 1]] = NOISE + 1
    below, right = (second > first).long().unbind(1)
    return cells, 2 * below + right


def learn(
    positions: bool,
    steps: int = 300,
    side: int = 8,
    batch: int = 64,
    seed: int = 0,
    report: int = 0,
) -> tuple[float, float]:
    """Accuracy on 1024 new grids before and after training."""
    torch.manual_seed(seed)
    model, generator = Pointer(positions), torch.Generator().manual_seed(seed)
    test, wanted = sample(1024, side, torch.Generator().manual_seed(seed + 1))

    @torch.no_grad()
    def accuracy() -> float:
        return float((model(test).argmax(-1) == wanted).float().mean())

    before = accuracy()
    rate = 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        cells, label = sample(batch, side, generator)
        loss = F.cross_entropy(model(cells), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if report and step % report == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr)
    return before, accuracy()


def train(steps: int = 500) -> list[dict[str, Any]]:
    """Train on grids of 8x8 cells with MD-TPE and MD-LRPE, and without."""
    rows = []
    for name, positions in (("with MD-TPE and MD-LRPE", True), ("without positions", False)):
        start = time.perf_counter()
        before, after = learn(positions, steps, report=50)
        note = f"{before:.2f} right before, {after:.2f} after {steps} steps (chance 0.25)"
        rows.append(row(f"direction on a grid {name}", time.perf_counter() - start, note=note))
    return rows


if __name__ == "__main__":
    main((scan_order, growth), {"train": train}, doc=__doc__)
