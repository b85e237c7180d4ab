"""VHR (arXiv 2412.13949): heads of SmolLM2 that a paragraph moves, scaled up, against random ones.

    python -m benchmarks.vhr [--json] [--smollm2]

The paper's claim: reinforcing heads whose output changes most without the image reduces hallucination
(CHAIR_S 49.7 to 33.3 on LLaVA-1.5). `--smollm2` measures the strongest heads, and the loss of an answer
about a paragraph that plays the image with the chosen halves of the last 13 layers scaled, next to
random halves (five minutes). Its cost: one more pass for the choice, one row of weights within the
prefill.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.timing import row
from regard.models import Spans, rank
from regard.steer.vhr import VHR
from regard.steer.vhr_branches import calibrate_vhr, vhd

from . import main
from .counted import edited, slope
from .needle_bed import measured, model, note, prompts, tell
from .small_llama import small_llama

LAYERS = range(17, 30)


def _small(n: int) -> tuple[Any, Tensor, Spans]:
    spans = Spans.of(n, image=(2, n // 2))
    return small_llama(3, 2 * n), (torch.arange(n)[None] * 7) % 64, spans


def rows_of_mlp(n: int) -> int:
    """Token rows that the feed-forward blocks see in one choice of heads, a layer."""
    small, ids, spans = _small(n)
    seen: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda module, x, y: seen.append(y.shape[:2].numel()))
        for layer in small.model.layers
    ]
    calibrate_vhr(small, ids, spans)
    for handle in handles:
        handle.remove()
    return sum(seen) // len(handles)


def weights_made(n: int) -> int:
    """Weights read by the choice within a prefill of `n` tokens."""
    small, ids, spans = _small(n)
    with (
        torch.no_grad(),
        edited(VHR, "_choose") as made,
        regard.patch(small, VHR(layers=[1, 2]), spans=spans),
    ):
        small(ids)
    return sum(made)


def growth(sizes: tuple[int, ...] = (128, 256, 512, 1024)) -> list[dict[str, Any]]:
    """Work of choosing heads, over the prompt's length."""
    start = time.perf_counter()
    passes = [rows_of_mlp(n) / n for n in sizes]
    first = f"{passes[0]:.2f} passes over the prompt at {sizes[0]}, {passes[-1]:.2f} at {sizes[-1]}"
    counts = [weights_made(n) for n in sizes]
    second = f"weights read grow as M^{slope(sizes, counts):.2f}: {counts[0]:,} to {counts[-1]:,}"
    taken = time.perf_counter() - start
    return [
        row("both branches at once", taken, note=first),
        row("choice within the prefill", None, note=second),
    ]


def random_halves(seed: int) -> Tensor:
    """Four random heads in each of the layers, as many as the median leaves, `(30, 9)`."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.zeros(30, 9, dtype=torch.bool)
    for layer in LAYERS:
        heads[layer, torch.randperm(9, generator=generator)[:4]] = True
    return heads


def smollm2() -> list[dict[str, Any]]:
    """The strongest heads, and the loss of the needle with chosen and random heads reinforced."""
    among = prompts()
    tell("divergence", 0, 10)
    mean = torch.stack([vhd(model(), p.ids[None], p.spans())[0] for p in among]).mean(0)
    first = vhd(model(), among[0].ids[None], among[0].spans())[0]
    rows = []
    for layer, head in rank(mean)[:3]:
        told = (
            f"divergence {mean[layer, head]:.2f} on average, {first[layer, head]:.2f} on prompt 0"
        )
        told += " (specification: (28,2) 5.71, (29,2) 4.62, (29,5) 4.05)"
        rows.append(row(f"head ({layer},{head})", None, note=told))
    rows.append(row("plain", None, note=note(*measured(None, among=among), ".148")))
    for alpha, spec, control in ((1.2, ".147", ".157"), (2.0, ".515", ".580")):
        tell(f"alpha {alpha}", len(rows), 10)
        chosen = [
            calibrate_vhr(model(), p.ids[None], p.spans(), alpha=alpha, layers=LAYERS)
            for p in among
        ]
        rows.append(row(f"Algorithm 1, alpha={alpha}", None, note=note(*measured(chosen), spec)))
        local = VHR(alpha, layers=LAYERS)
        found = note(*measured(local, among=among))
        rows.append(row(f"chosen within the prefill, alpha={alpha}", None, note=found))
        for seed in (0, 1):
            random = VHR(alpha, random_halves(seed))
            found = note(*measured(random, among=among), control)
            rows.append(row(f"random halves, seed {seed}, alpha={alpha}", None, note=found))
    return rows


if __name__ == "__main__":
    main((growth,), {"smollm2": smollm2}, doc=__doc__)
