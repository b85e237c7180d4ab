"""TransNormerLLM (arXiv 2405.17381): decoding at constant cost, counted work, a model that learns.

    python -m benchmarks.tnl [--json] [--only decoding|growth] [--train]

The paper's claim: a token costs the same at any length, in training and in decoding, and decoding step
by step gives what the pass over the whole prompt gives. `--train` trains a small character model on the
texts of Python's own help (under two minutes) and compares it with counts of pairs of characters.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.timing import row, seconds
from regard.linear.tnl_model import TransNormerLLM

from . import main
from .counted import slope

VOCAB = 128


def _model() -> TransNormerLLM:
    torch.manual_seed(0)
    return TransNormerLLM(VOCAB, 128, 4, 4).eval()


def _ids(n: int) -> Tensor:
    return torch.randint(VOCAB, (1, n), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoding(
    contexts: Sequence[int] = (128, 1024, 4096), repeats: int = 50
) -> list[dict[str, Any]]:
    """Seconds of one decoding step after contexts of several lengths."""
    model, ids = _model(), _ids(max(contexts) + 1)
    whole = model(ids)
    rows, times = [], []
    for context in contexts:
        _, state = model(ids[:, :context], return_state=True)
        last = ids[:, context : context + 1]
        logits, _ = model(last, state, return_state=True)
        gap = float((logits[:, 0] - whole[:, context]).abs().max())
        step = partial(model, last, state, return_state=True)
        times.append(seconds(step, repeats, warmup=3))
        held = sum(x.memory.numel() for x in state)
        note = f"{held} numbers of state; logits differ from one pass by {gap:.1e}"
        rows.append(row(f"a step after {context} tokens", times[-1], note=note))
    state, gap = None, 0.0
    some = min(contexts[-1], 512)
    for at in range(some):
        logits, state = model(ids[:, at : at + 1], state, return_state=True)
        gap = max(gap, float((logits[:, 0] - whole[:, at]).abs().max()))
    note = (
        f"a step after {contexts[-1]} tokens takes {times[-1] / times[0]:.2f} times one after "
        f"{contexts[0]}; {some} tokens one by one differ from one pass by at most {gap:.1e} in logits "
        f"of up to {float(whole.abs().max()):.1f}"
    )
    rows.append(row("decoding", times[-1], note=note))
    return rows


@torch.no_grad()
def growth(
    contexts: Sequence[int] = (64, 256, 1024, 4096), sizes: Sequence[int] = (512, 1024, 2048, 4096)
) -> list[dict[str, Any]]:
    """Counted operations of a step over its context, and of a whole prompt over its length."""
    model, rows = _model(), []
    ids = _ids(max(*contexts, *sizes) + 1)
    start = time.perf_counter()
    work = []
    for context in contexts:
        _, state = model(ids[:, :context], return_state=True)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, :1], state)
        work.append(counter.get_total_flops())
    note = f"{work[0]} operations, growing as N^{slope(contexts, work):.3f}"
    name = f"a step after {contexts[0]}..{contexts[-1]} tokens"
    rows.append(row(name, time.perf_counter() - start, note=note))
    start = time.perf_counter()
    work = []
    for n in sizes:
        with FlopCounterMode(display=False) as counter:
            model(ids[:, :n])
        work.append(counter.get_total_flops())
    note = f"operations grow as N^{slope(sizes, work):.3f}; {work[-1] // sizes[-1]} a token"
    rows.append(row(f"a prompt of {sizes[0]}..{sizes[-1]}", time.perf_counter() - start, note=note))
    return rows


def _text() -> tuple[Tensor, Tensor]:
    """Characters of Python's help topics: nine tenths to train on, the rest to test."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(list(text.encode("ascii", "replace")))
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def _bits(model: TransNormerLLM, ids: Tensor, length: int, batches: int = 8) -> float:
    """Bits a character of the first `batches` pieces of `length` characters, 8 at a time."""
    rows = ids[: batches * 8 * length + 1]
    x, y = rows[:-1].view(-1, length), rows[1:].view(-1, length)
    with torch.no_grad():
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    return float(loss) / math.log(2)


def _pair_bits(train: Tensor, test: Tensor) -> float:
    """Bits a character of pair counts with one added to each."""
    counts = torch.ones(VOCAB, VOCAB)
    counts.index_put_((train[:-1], train[1:]), torch.tensor(1.0), accumulate=True)
    share = counts / counts.sum(1, keepdim=True)
    return float(-share[test[:-1], test[1:]].log2().mean())


def learn(
    steps: int = 300, length: int = 256, batch: int = 8, seed: int = 0, report: int = 50
) -> tuple[float, float, float]:
    """Train a small model; bits a character on held-out text before and after, and of pairs."""
    train_ids, test_ids = _text()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = TransNormerLLM(VOCAB, 96, 3, 4, 192)
    before = _bits(model, test_ids, length)
    rate = 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        at = torch.randint(len(train_ids) - length - 1, (batch, 1), generator=generator)
        piece = train_ids[at + torch.arange(length + 1)]
        loss = F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report and step % report == 0:
            print(f"step {step}: {loss.item() / math.log(2):.2f} bits", file=sys.stderr)
    return before, _bits(model, test_ids, length), _pair_bits(train_ids, test_ids)


def train(steps: int = 300) -> list[dict[str, Any]]:
    """Train a character model on Python's help and compare it with pair counts."""
    start = time.perf_counter()
    before, after, pairs = learn(steps)
    note = (
        f"{before:.2f} bits a held-out character before, {after:.2f} after {steps} steps; pairs of "
        f"characters counted {pairs:.2f}"
    )
    return [row("character model of 3 layers, dim 96", time.perf_counter() - start, note=note)]


if __name__ == "__main__":
    main((decoding, growth), {"train": train}, doc=__doc__)
