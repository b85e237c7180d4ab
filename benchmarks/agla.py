"""AGLA (arXiv 2406.12718): assembling logits of a whole and of a masked paragraph, on SmolLM2.

    python -m benchmarks.agla [--json] [--smollm2]

The paper's claim: adding the logits of a prompt-relevant part improves answers. `--smollm2` hides all
but the relevant third of a paragraph with a needle, and measures the needle's loss, teacher-forced. The
plausibility cut would make the loss infinite wherever it cuts the answer, so that it is counted apart.
Its cost: twice the tokens.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.bench.timing import row
from regard.models import patch
from regard.steer.agla import AGLA, assemble_logits
from regard.steer.agla_text import mask_context, text_relevance

from . import main
from .needle_bed import Prompt, model, prompts, tell
from .small_llama import small_llama


def growth(steps: tuple[int, ...] = (4, 8, 16)) -> list[dict[str, Any]]:
    """Tokens that go through the model, against plain generation."""
    small = small_llama(2)
    tokens: list[int] = []
    small.get_input_embeddings().register_forward_hook(lambda m, a, o: tokens.append(o.shape[1]))
    ids = torch.arange(1, 33)[None]
    start = time.perf_counter()
    shares = []
    for count in steps:
        sizes = []
        for steered in (patch(small, AGLA(small, ids)), nullcontext()):
            tokens.clear()
            long = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            with steered:
                small.generate(ids, **long)
            sizes.append(sum(tokens))
        shares.append(sizes[0] / sizes[1])
    told = ", ".join(f"{x:.2f}" for x in shares)
    note = f"{told} tokens for each of plain generation (bound: 2)"
    return [row(f"answers of {steps} tokens", time.perf_counter() - start, note=note)]


@torch.no_grad()
def _logits(prompt: Prompt, mask: Tensor | None) -> Tensor:
    """Logits `(n, V)` of the answer's tokens, part of the prompt hidden."""
    ids = torch.cat([prompt.ids, prompt.answer])[None]
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(prompt.answer)[None]], 1)
    kept = prompt.answer.shape[0] + 1
    out = model()(ids, attention_mask=mask, use_cache=False, logits_to_keep=kept)
    logits: Tensor = out.logits[0, :-1].float()
    return logits


def smollm2(count: int = 10) -> list[dict[str, Any]]:
    """Loss of the needle with the logits of a third of its paragraph added."""
    among = prompts()[:count]
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"relevant": [], "random": []}
    hits: dict[str, float] = {"relevant": 0.0, "random": 0.0}
    for done, prompt in enumerate(among):
        tell("relevance", done, count)
        ids, spans = prompt.ids[None], prompt.spans()
        plain = _logits(prompt, None)
        relevance = text_relevance(model(), ids, spans)
        for name in found:
            scores = (
                relevance
                if name == "relevant"
                else torch.rand(relevance.shape, generator=generator)
            )
            mask = mask_context(ids, scores, spans, 1 / 3)
            inside = mask[0, slice(*prompt.context)].bool()
            hits[name] += float(inside[prompt.needle_tokens()].float().mean()) / count
            found[name].append((plain, _logits(prompt, mask), prompt.answer))
    rows = []
    for name, cases in found.items():
        for alpha in (0.0, 0.5, 1.0, 2.0):
            losses, cut = [], []
            for plain, masked, answer in cases:
                mixed = assemble_logits(plain, masked, alpha, 0.0)
                losses.append(float(torch.nn.functional.cross_entropy(mixed, answer)))
                plausible = assemble_logits(plain, masked, alpha, 0.5).gather(-1, answer[:, None])
                cut.append(float(torch.isinf(plausible).float().mean()))
            told = (
                f"loss of the needle {sum(losses) / count:.3f} nats; beta=0.5 cuts "
                f"{sum(cut) / count:.1%} of its tokens; {hits[name]:.0%} of the needle kept"
            )
            rows.append(row(f"{name} third, alpha={alpha}", None, note=told))  # type: ignore[arg-type]
    return rows


if __name__ == "__main__":
    main((growth,), {"smollm2": smollm2}, doc=__doc__)
