"""ACT (arXiv 2406.15765): sinks scaled down in SmolLM2, everywhere and in calibrated heads.

    python -m benchmarks.act [--json] [--smollm2]

The paper's claim: hidden sinks cost accuracy, and scaling them down in heads chosen on calibration
texts raises it. `--smollm2` measures the loss on the three texts of
`tests/golden/data/smollm2-act.npz`, of which the first one serves calibration: all heads at once, the
helpful heads, and the harmful ones (two to five minutes). Its cost: the explicit weights of the edited
heads.
"""

from __future__ import annotations

import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import regard
from regard.bench.timing import row
from regard.models import load
from regard.steer.act import ACT
from regard.steer.act_heads import calibrate_heads, helpful_heads

from . import main
from .counted import edited, slope
from .small_llama import small_llama

DATA = Path(__file__).parent.parent / "tests" / "golden" / "data" / "smollm2-act.npz"
LAYERS = range(2, 29)
MARGIN = 1e-4


def weights_made(n: int) -> int:
    """Weights that the method edits in a prompt of `n` tokens, on a small Llama."""
    model = small_llama(2, 2 * n)
    with edited(ACT, "_calibrate") as made, torch.no_grad(), regard.patch(model, ACT()):
        model((torch.arange(n)[None] * 7) % 64)
    return sum(made)


def growth(sizes: tuple[int, ...] = (128, 256, 512, 1024)) -> list[dict[str, Any]]:
    """Weights edited over the prompt's length."""
    start = time.perf_counter()
    counts = [weights_made(n) for n in sizes]
    note = f"grow as N^{slope(sizes, counts):.2f}: {counts[0]:,} to {counts[-1]:,}"
    taken = time.perf_counter() - start
    return [row(f"weights edited, N={sizes[0]}..{sizes[-1]}", taken, note=note)]


@lru_cache(maxsize=1)
def model() -> Any:
    """SmolLM2, once."""
    return load("smollm2")[0]


def texts(arrays: Any = None) -> list[Tensor]:
    """The calibration text and the two test texts `(N,)` of a golden file's arrays."""
    arrays = np.load(DATA) if arrays is None else arrays
    return [torch.from_numpy(arrays[x]).long() for x in ("cal_ids", "test_ids", "test2_ids")]


@torch.no_grad()
def loss(steered: Any, ids: Tensor) -> float:
    """Mean loss of a text in nats a token."""
    logits = steered(ids[None], use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[1:]))


def tell(words: str, done: int, total: int) -> None:
    """Progress, on stderr, every layer."""
    if done % 9 == 0:
        print(f"  {words} {done}/{total}", file=sys.stderr)


def smollm2() -> list[dict[str, Any]]:
    """Loss with all heads, the helpful ones and the harmful ones calibrated, on three texts."""
    given = texts()
    base = [loss(model(), ids) for ids in given]
    rows = [row("plain", None, note=_three(base, "nats a token"))]

    def add(name: str, method: ACT, spec: str = "") -> None:
        print(f"  {name}", file=sys.stderr)
        changes = []
        for ids, before in zip(given, base, strict=True):
            with regard.patch(model(), method):
                changes.append(loss(model(), ids) - before)
        told = f" (specification: {spec})" if spec else ""
        rows.append(row(name, None, note=_three(changes, f"nats{told}")))

    for threshold, spec in ((0.1, "+.022/+.031/+.033"), (0.15, "+.012/+.015/+.012"), (0.3, "0")):
        add(f"all heads, threshold {threshold}", ACT(threshold=threshold, layers=LAYERS), spec)
    once = ACT(threshold=5.0 / given[0].shape[0], layers=LAYERS)
    add("all heads, threshold 5/N, N of the first text", once, "+.098/+.144/+.269")
    add("all heads, threshold 5/N", ACT(threshold=5.0, per_length=True, layers=LAYERS))
    start = time.perf_counter()
    change = calibrate_heads(model(), lambda m: loss(m, given[0]), LAYERS, progress=tell)
    tried = change[~change.isnan()]
    lower = int((tried < 0).sum())
    note = f"{lower} of {len(tried)} heads lower the loss alone, from {tried.min():+.4f} to "
    note += f"{tried.max():+.4f} (specification: 72 of 243, -.0066 to +.0067)"
    rows.append(row("one head at a time", time.perf_counter() - start, note=note))
    good, bad = helpful_heads(change, MARGIN), helpful_heads(-change, MARGIN)
    add(f"the {len(good)} helpful heads", ACT(heads=good), "69 heads, -.061/+.003/-.030")
    add(f"the {len(bad)} harmful heads", ACT(heads=bad), "69 heads, +.079/+.033/+.044")
    return rows


def _three(values: list[float], unit: str) -> str:
    return " / ".join(f"{x:+.3f}" for x in values) + f" {unit}, calibration / test / test 2"


if __name__ == "__main__":
    main((growth,), {"smollm2": smollm2}, doc=__doc__)
