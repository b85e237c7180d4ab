"""GIFT (arXiv 2510.22067): where SmolLM2 finds the needle while it reads the question.

    python -m benchmarks.gift [--json] [--smollm2]

The paper's claim: shifts of the gaze while the question is read tell which image tokens matter.
`--smollm2` measures it as the AUC of each layer's map for the needle among a paragraph's tokens, next to
the mean attention of the question's rows and that of the last row, and the loss of the answer with the
method on (two minutes). Its cost: one row of weights a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.timing import row
from regard.models import SiteProbe, Spans
from regard.models.edit import In
from regard.steer.gift import GIFT
from regard.steer.gift_gaze import GazeProbe

from . import main
from .counted import edited, slope
from .needle_bed import Prompt, measured, model, note, prompts, tell
from .small_llama import small_llama


def weights_made(n: int) -> int:
    """Weights edited in one step after a prompt of `n` tokens, on a small Llama."""
    small = small_llama(3, 2 * n)
    ids = (torch.arange(n)[None] * 7) % 64
    spans = Spans.of(n - 1, image=(2, n // 2), text=(n - 10, n - 2))
    method = GIFT(setup=[0], layers=[1, 2])
    with (
        edited(GIFT, "_enhance") as made,
        torch.no_grad(),
        regard.patch(small, method, spans=spans),
    ):
        cache = small(ids[:, :-1]).past_key_values
        made.clear()
        small(ids[:, -1:], past_key_values=cache)
    return sum(made)


def growth(sizes: tuple[int, ...] = (128, 256, 512, 1024)) -> list[dict[str, Any]]:
    """Weights edited in a step, over the length."""
    start = time.perf_counter()
    counts = [weights_made(n) for n in sizes]
    told = f"grow as M^{slope(sizes, counts):.2f}: {counts[0]:,} to {counts[-1]:,}"
    taken = time.perf_counter() - start
    return [row(f"weights edited in a step, M={sizes[0]}..{sizes[-1]}", taken, note=told)]


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties half."""
    above = scores[positive][:, None] - scores[~positive][None]
    return float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())


@torch.no_grad()
def auc_maps(steered: Any, prompt: Prompt) -> dict[str, list[float]]:
    """AUC of each layer's three maps for the needle's tokens among the context's."""
    spans, needle = prompt.spans(), prompt.needle_tokens()
    gaze, asked = GazeProbe(), SiteProbe("weights", rows=In("text"))
    last = SiteProbe("weights", rows="last")
    with regard.watch(steered, gaze, asked, last, spans=spans):
        steered(prompt.ids[None], use_cache=False, logits_to_keep=1)
    context = slice(*prompt.context)
    heat = gaze.result()
    return {
        "gaze": [auc(heat[layer][0], needle) for layer in sorted(heat)],
        **{
            name: [auc(w[0, ..., context].mean((0, 1)), needle) for _, w in sorted(found.items())]
            for name, found in (("question", asked.result()[0]), ("last", last.result()[0]))
        },
    }


def auc_by_layer(among: Sequence[Prompt]) -> dict[str, list[float]]:
    """Mean over prompts."""
    every = [auc_maps(model(), prompt) for prompt in among]
    return {
        name: torch.tensor([one[name] for one in every]).mean(0).tolist()
        for name in ("gaze", "question", "last")
    }


def smollm2() -> list[dict[str, Any]]:
    """AUC of the maps by layer, and the loss of the needle with the method on."""
    among = prompts()
    tell("maps", 0, 2)
    found = auc_by_layer(among)
    rows = []
    for name, spec in (("gaze", ".86"), ("question", ".85"), ("last", ".61")):
        values = found[name]
        best = max(range(len(values)), key=values.__getitem__)
        told = f"AUC {values[21]:.2f} at layer 21 (specification: {spec}), "
        told += f"best {values[best]:.2f} at {best}, {values[10]:.2f} at layer 10"
        rows.append(row(f"{name}: needle among the context", None, note=told))
    tell("answers", 1, 2)
    rows.append(row("plain", None, note=note(*measured(None, among=among), ".148")))
    for alpha in (0.5, 5.0):
        method = GIFT(alpha=alpha, setup=[21], layers=range(22, 29))
        name = f"setup 21, enhanced 22 to 28, alpha={alpha}"
        rows.append(row(name, None, note=note(*measured(method, among=among))))
    default = measured(GIFT(alpha=5.0), among=among)
    rows.append(row("defaults, alpha=5", None, note=note(*default)))
    return rows


if __name__ == "__main__":
    main((growth,), {"smollm2": smollm2}, doc=__doc__)
