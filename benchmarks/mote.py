"""MoTE (arXiv 2502.11096): switching off the expert of a dialect, in a small mixture trained on two.

    python -m benchmarks.mote [--json] [--train]

The paper's claim: switching off the experts that a behaviour uses takes the behaviour away, random ones
do little. `--train` trains a small Qwen3-MoE on two synthetic languages (under a minute). Its cost:
none, the experts do as much as before.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.timing import row
from regard.models import patch, random_heads
from regard.steer.mote import TunedExperts
from regard.steer.mote_resonance import behaviour_score, resonance_table, routing_map
from regard.steer.mote_route import Mode

from . import main
from .counted import slope
from .needle_bed import tell

WORDS = 16
LAYERS, EXPERTS = 2, 8


def _model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=2 * WORDS,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config)


def growth(sizes: tuple[int, ...] = (32, 64, 128, 256)) -> list[dict[str, Any]]:
    """Pairs of token and expert over the length, tuned and plain."""
    model = _model().eval()
    rows = []
    modes: tuple[Mode, ...] = ("drop", "mask")
    for mode in modes:
        start, work, plain = time.perf_counter(), [], []
        for n in sizes:
            ids = torch.arange(n)[None] % (2 * WORDS)
            plain.append(_pairs(model, ids))
            with patch(model, TunedExperts([(0, 1), (1, 2)], [(1, 3)], mode)):
                work.append(_pairs(model, ids))
        told = (
            f"grow as N^{slope(sizes, work):.2f}: {work[0]:,} to {work[-1]:,} pairs of token and "
            f"expert, {work[-1] / plain[-1]:.2f} times the plain model's"
        )
        rows.append(
            row(f"{mode}, N={sizes[0]}..{sizes[-1]}", time.perf_counter() - start, note=told)
        )
    return rows


@torch.no_grad()
def _pairs(model: Any, ids: Tensor) -> int:
    """Token-expert pairs that the expert blocks were given."""
    seen: list[int] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1].numel()))
        for layer in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return sum(seen)


def _texts(count: int, language: int, generator: torch.Generator, length: int = 24) -> Tensor:
    """Walks over a language's own words: from each, one of two words follows."""
    own = torch.Generator().manual_seed(10 + language)
    follows = torch.stack([torch.randperm(WORDS, generator=own) for _ in range(2)], 1)
    words = [torch.randint(WORDS, (count,), generator=generator)]
    for _ in range(length - 1):
        coin = torch.randint(2, (count,), generator=generator)
        words.append(follows[words[-1], coin])
    return torch.stack(words, 1) + WORDS * language


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor) -> float:
    return float(model(ids, labels=ids).loss)


def train(steps: int = 300) -> list[dict[str, Any]]:
    """Loss of two languages with an expert of the first one off, and with random experts off."""
    model, generator = _model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    start = time.perf_counter()
    for step in range(steps):
        if step % 100 == 0:
            tell("training", step, steps)
        ids = torch.cat([_texts(16, language, generator) for language in range(2)])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    taken = time.perf_counter() - start
    model.eval()
    held = [_texts(64, language, generator) for language in range(2)]
    base = [_loss(model, x) for x in held]
    rows = [
        row(
            "trained model",
            taken,
            note=f"loss {base[0]:.3f} and {base[1]:.3f} (a coin a word: at most 0.693)",
        )
    ]
    found = _texts(32, 0, generator), _texts(32, 1, generator)
    labels = torch.arange(64) < 32
    score = behaviour_score(routing_map(model, torch.cat(found)), labels)
    top = [(layer, expert) for layer, expert, _ in resonance_table(score, 2).rows]
    drawn = torch.Generator().manual_seed(1)
    others = [random_heads(LAYERS, EXPERTS, 2, exclude=top, generator=drawn) for _ in range(8)]
    modes: tuple[Mode, ...] = ("drop", "mask")
    for mode in modes:
        change = _change(model, held, base, top, mode)
        told = f"loss {change[0]:+.3f} and {change[1]:+.3f}"
        rows.append(row(f"{mode}: top experts {top} off", 0.0, note=told))
        each = [_change(model, held, base, off, mode) for off in others]
        means = [sum(x[at] for x in each) / len(each) for at in range(2)]
        most = max(x[0] for x in each)
        told = f"loss {means[0]:+.3f} and {means[1]:+.3f}, highest of the first {most:+.3f}"
        rows.append(row(f"{mode}: two random experts off, mean of {len(others)}", 0.0, note=told))
    return rows


def _change(
    model: Any, held: list[Tensor], base: list[float], off: list[tuple[int, int]], mode: Mode
) -> list[float]:
    with patch(model, TunedExperts(off, mode=mode)):
        return [_loss(model, x) - was for x, was in zip(held, base, strict=True)]


if __name__ == "__main__":
    main((growth,), {"train": train}, doc=__doc__)
