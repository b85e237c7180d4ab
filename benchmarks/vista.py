"""VISTA (arXiv 2502.03628): what a context adds to SmolLM2's last token, steered into an empty prompt.

    python -m benchmarks.vista [--json] [--smollm2]

The paper's claim: steering along image-minus-no-image brings back what the image says. `--smollm2` takes
a paragraph with a needle for the image: the direction is calibrated with it, and steers the prompt
without it. Its cost: two passes over the prompt, then one edit a token and layer.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.timing import row
from regard.models import HeadMask, Method, drop_span
from regard.steer.vista import NormPreservingSteer, calibrate_vista, last_hidden

from . import main
from .counted import edited, slope
from .needle_bed import Prompt, model, prompts, tell
from .small_llama import small_llama


def growth(sizes: tuple[int, ...] = (128, 256, 512, 1024)) -> list[dict[str, Any]]:
    """Passes of the calibration, and numbers edited over the length of the prompt."""
    small = small_llama(3, 2 * max(sizes))
    passes: list[int] = []
    handle = small.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    start = time.perf_counter()
    ids = torch.arange(max(sizes))[None] * 7 % 64
    v = calibrate_vista(small, ids[:, 9:64], ids[:, :64]).v
    handle.remove()
    work = []
    for n in sizes:
        method = NormPreservingSteer(v)
        with (
            torch.no_grad(),
            edited(NormPreservingSteer, "_steer") as made,
            regard.patch(small, method),
        ):
            small(ids[:, :n])
        work.append(sum(made))
    taken = time.perf_counter() - start
    told = f"grow as N^{slope(sizes, work):.2f}: {work[0]:,} to {work[-1]:,} numbers edited"
    return [
        row("calibration", taken, note=f"{len(passes)} passes over the prompt"),
        row(f"prompt, N={sizes[0]}..{sizes[-1]}", taken, note=told),
    ]


@torch.no_grad()
def _answer(ids: Tensor, prompt: Prompt, method: Method) -> tuple[float, Tensor]:
    """Loss of the needle after a prompt without the context, and its last hidden states `(L, C)`."""
    whole = torch.cat([ids, prompt.answer[None]], 1)
    with regard.patch(model(), method):
        kept = prompt.answer.shape[0] + 1
        logits = model()(whole, use_cache=False, logits_to_keep=kept).logits[0, :-1]
        hidden = last_hidden(model(), ids)[0]
    return float(torch.nn.functional.cross_entropy(logits, prompt.answer)), hidden


def smollm2(lams: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.17)) -> list[dict[str, Any]]:
    """The direction of the context in a prompt without it: cosine and loss over the strength."""
    among = prompts()[:10]
    short = [drop_span(p.ids[None], p.spans(), "image")[0] for p in among]
    full = [calibrate_vista(model(), s, p.ids[None]).v for s, p in zip(short, among, strict=True)]
    cases: list[tuple[str, float, int]] = [("plain", 0.0, 0)]
    cases += [(f"lam={lam}", lam, 0) for lam in lams]
    cases += [(f"lam={lam}, another prompt's direction", lam, 1) for lam in lams]
    rows = []
    for done, (name, lam, other) in enumerate(cases):
        tell(name, done, len(cases))
        losses, angles = [], []
        for at, prompt in enumerate(among):
            v = full[(at + other) % len(full)]
            method = NormPreservingSteer(v, lam) if lam else HeadMask([])
            loss, hidden = _answer(short[at], prompt, method)
            losses.append(loss)
            angles.append(float(torch.cosine_similarity(hidden[-1], full[at][-1], -1)))
        told = (
            f"loss of the needle without its context {sum(losses) / len(losses):.3f} nats, "
            f"cos(last hidden, v) {sum(angles) / len(angles):+.3f}"
        )
        rows.append(row(name, None, note=told))  # type: ignore[arg-type]
    return rows


if __name__ == "__main__":
    main((growth,), {"smollm2": smollm2}, doc=__doc__)
