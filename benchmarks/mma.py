"""Modality-mutual attention (arXiv 2503.02597): an image that is read knowing the question.

    python -m benchmarks.mma [--json] [--train]

The claim as a toy task (`--train`, about two minutes): a sequence of symbols plays the image, then two
symbols are asked for, and the answer says which of the two occurs more often. Two-layer decoders with
the causal and with the mutual mask see the same batches for the same number of steps; only the answer
is in the loss. Its cost: the pairs of the mask grow as causal ones.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

import regard
from regard import Causal, Full, Rectangles
from regard.bench.timing import row
from regard.models import Spans
from regard.steer.mma import ModalityMutual

from . import main
from .counted import slope

SYMBOLS, IMAGE = 8, 16
SPANS = Spans.of(IMAGE + 3, image=(1, IMAGE + 1), text=(IMAGE + 1, IMAGE + 3))


def growth(sizes: tuple[int, ...] = (64, 256, 1024)) -> list[dict[str, Any]]:
    """Pairs that attend over the length: half of it image, an eighth question."""
    start = time.perf_counter()
    counts, causal = [], []
    for n in sizes:
        mask = Causal() | Rectangles(((0, n // 2),), ((n // 2, n // 2 + n // 8),))
        counts.append(mask.layout(n, n, 32).allowed_pairs())
        causal.append(Causal().layout(n, n, 32).allowed_pairs())
    note = f"grow as N^{slope(sizes, counts):.2f}, {counts[-1] / causal[-1]:.2f} of causal's"
    return [row(f"pairs, N={sizes[0]}..{sizes[-1]}", time.perf_counter() - start, note=note)]


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids `(B, 1 + image + 2)` and the answer, 1 where the second symbol is the more frequent."""
    image = torch.randint(SYMBOLS, (size, IMAGE), generator=generator)
    asked = torch.rand(size, SYMBOLS, generator=generator).argsort(-1)[:, :2]
    counts = (image[:, None] == asked[..., None]).sum(-1)
    # A draw: one place of the image is given to one of the two.
    drawn = (counts[:, 0] == counts[:, 1]).nonzero().flatten()
    winner = torch.randint(2, (size,), generator=generator)
    for entry in drawn.tolist():
        free = ((image[entry] != asked[entry, 0]) & (image[entry] != asked[entry, 1])).nonzero()
        image[entry, free[0, 0]] = asked[entry, winner[entry]]
    counts = (image[:, None] == asked[..., None]).sum(-1)
    begin = torch.full((size, 1), SYMBOLS)
    return torch.cat([begin, image, asked], 1), (counts[:, 1] > counts[:, 0]).long()


def _decoder(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=SYMBOLS + 1,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
    )


def accuracy(mutual: bool, steps: int, seed: int) -> list[float]:
    """Accuracy on 2000 new sequences, before the training and after it."""
    model = _decoder(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tests = batch(2000, torch.Generator().manual_seed(7))
    found = []
    with regard.patch(model, ModalityMutual() if mutual else Full(), spans=SPANS):

        def answer(ids: Tensor) -> Tensor:
            logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1, :2]
            return logits

        def test() -> None:
            with torch.no_grad():
                found.append(float((answer(tests[0]).argmax(-1) == tests[1]).double().mean()))

        test()
        for step in range(steps):
            ids, label = batch(64, generator)
            loss = torch.nn.functional.cross_entropy(answer(ids), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 99:
                name = "mutual" if mutual else "causal"
                print(f"  {name}, seed {seed}: {step + 1}/{steps} {loss:.3f}", file=sys.stderr)
        test()
    return found


def train(steps: int = 600, seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Accuracy of causal and mutual decoders after equal steps."""
    rows, means = [], []
    for mutual in (False, True):
        start = time.perf_counter()
        found = [accuracy(mutual, steps, seed) for seed in seeds]
        means.append(sum(x[-1] for x in found) / len(found))
        each = ", ".join(f"{x[0]:.3f} to {x[-1]:.3f}" for x in found)
        name = "mutual" if mutual else "causal"
        note = f"accuracy {means[-1]:.3f} after {steps} steps (seeds: {each})"
        rows.append(row(f"{name} mask", time.perf_counter() - start, note=note))
    note = f"accuracy {means[1] - means[0]:+.3f} by the mutual mask"
    return [*rows, row("difference", None, note=note)]


if __name__ == "__main__":
    main((growth,), {"train": train}, doc=__doc__)
