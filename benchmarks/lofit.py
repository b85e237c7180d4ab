"""LoFiT (arXiv 2406.01563): biases of heads that step 1 chose against those of random heads, on SmolLM2.

    python -m benchmarks.lofit [--json] [--train]

The paper's claim: tuning the heads that scales single out beats tuning random ones. `--train` teaches a
fixed style of replies on short prompts and measures the loss of held-out ones. Its cost: D numbers a
head and part, and as many multiplications a token.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.timing import row
from regard.models import load, random_heads
from regard.steer.lofit import LoFiT
from regard.steer.lofit_train import calibrate_heads, fit_biases

from . import main
from .counted import edited, slope
from .needle_bed import tell

# fmt: off
THINGS = [
    "bread", "rain", "music", "snow", "tea", "iron", "sand", "glass", "wool", "coal", "milk", "rice",
    "salt", "wood", "paper", "gold", "silver", "corn", "oil", "ice", "fire", "stone", "honey", "butter",
    "soap", "rope", "leather", "cotton", "silk", "clay", "paint", "ink", "steel", "wheat", "beans",
    "apples",
]
# fmt: on
ASK = "Question: Where can I find {}?\nAnswer:"
REPLY = " Ahoy, sailor! Ye shall find {} beneath the old harbour, by the light of the moon."


def growth() -> list[dict[str, Any]]:
    """Parameters over the number of heads K, and numbers edited over the length N."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64,
    )
    small = LlamaForCausalLM(config).eval()
    start = time.perf_counter()
    every = [(layer, head) for layer in range(4) for head in range(8)]
    counts, lengths = (2, 4, 8, 16, 32), (64, 128, 256)
    sizes = [sum(p.numel() for p in LoFiT(small, every[:k]).trained()) for k in counts]
    work = []
    for n in lengths:
        method = LoFiT(small, every[::4])
        with torch.no_grad(), edited(LoFiT, "_edit") as made, regard.patch(small, method):
            small(torch.arange(n)[None] % 64)
        work.append(sum(made))
    taken = time.perf_counter() - start
    told = f"grow as K^{slope(counts, sizes):.2f}: {sizes[0]} to {sizes[-1]}, 2 D = 16 a head"
    told_n = f"grow as N^{slope(lengths, work):.2f}: {work[0]:,} to {work[-1]:,} numbers edited"
    return [
        row("parameters, K=2..32", taken, note=told),
        row("prompt, N=64..256", taken, note=told_n),
    ]


def _batch(tokenizer: Any, things: list[str]) -> dict[str, Tensor]:
    """Prompts and replies, padded on the right; the loss is on the replies."""
    prompts = [tokenizer(ASK.format(t))["input_ids"] for t in things]
    replies = [tokenizer(REPLY.format(t))["input_ids"] for t in things]
    n = max(len(a) + len(b) for a, b in zip(prompts, replies, strict=True))
    ids = torch.zeros(len(things), n, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for at, (a, b) in enumerate(zip(prompts, replies, strict=True)):
        stop = len(a) + len(b)
        ids[at, :stop], mask[at, :stop] = torch.tensor(a + b), 1
        labels[at, len(a) : stop] = torch.tensor(b)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def _loss(model: Any, batch: dict[str, Tensor], method: LoFiT) -> float:
    with regard.patch(model, method):
        return float(model(**batch, use_cache=False).loss)


def train(k: int = 8, draws: int = 2) -> list[dict[str, Any]]:
    """A style of replies, taught through 8 chosen heads and through 8 random ones."""
    model, tokenizer = load("smollm2")
    batches = [_batch(tokenizer, THINGS[at : at + 8]) for at in range(0, 24, 8)]
    held = _batch(tokenizer, THINGS[24:])
    rows = [
        row("base model", None, note=f"held-out loss {_loss(model, held, LoFiT(model)):.3f} nats")
    ]  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    chosen = calibrate_heads(model, batches, k, epochs=3, generator=g, progress=tell)
    rows.append(row("step 1: scales of all heads", time.perf_counter() - start, note=f"{chosen}"))
    depth, count = model.config.num_hidden_layers, model.config.num_attention_heads
    cases = [(f"step 2: {k} chosen heads", chosen)]
    for seed in range(draws):
        drawn = torch.Generator().manual_seed(seed)
        heads = random_heads(depth, count, k, exclude=chosen, generator=drawn)
        cases.append((f"step 2: {k} random heads, seed {seed}", heads))
    for name, heads in cases:
        start = time.perf_counter()
        method = fit_biases(
            model,
            batches,
            heads,
            epochs=4,
            generator=torch.Generator().manual_seed(0),
            progress=tell,
        )
        told = f"held-out loss {_loss(model, held, method):.3f} nats, {method.v.numel()} parameters"
        rows.append(row(name, time.perf_counter() - start, note=told))
    return rows


if __name__ == "__main__":
    main((growth,), {"train": train}, doc=__doc__)
