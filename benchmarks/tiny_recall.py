"""Recall of marked tokens by a small decoder trained from scratch: the bed of several claims.

A sequence of `n` tokens is noise of 16 kinds. A few places hold a marked token, one of 16 others;
the last place asks. The answer is the last of the marked tokens, so chance is 1 / 16. With one mark
the model must find it, with three it must also tell which came last. Marks stand at least `nearest`
places before the question, so that a local pattern of less reach cannot answer.

    from benchmarks.tiny_recall import Recall, train_recall
    train_recall(lambda layer: attention)                       # attention(q, k, v) -> out
    train_recall(make_layer=lambda layer: module)               # module(x) -> y, its own projections
    train_recall(lambda layer: attention, task=Recall(marks=3))

`attention(q, k, v)` gets `(B, heads, N, width / heads)` and returns the same shape; where it is an
`nn.Module` its parameters are trained with the rest. A `make_layer` module maps `(B, N, width)` to the
same. The model adds learned position embeddings, so attention itself needs none.

To ask a trained model under another setting, use the parts: `model = train(...)`, then
`model.attend_with(...)` or a change of the attention that was made, then `accuracy(model, task)`;
`train(model=model)` goes on training it. `Recall(every=8)` puts a landmark token behind each 8 tokens
(the question stays last), `Recall.landmarks()` says where.

    python -m benchmarks.tiny_recall         # full attention on both tasks
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import Causal, attend
from regard.bench.timing import row

from . import main

VALUES = 16
ASK, LANDMARK = 2 * VALUES, 2 * VALUES + 1
TOKENS = 2 * VALUES + 2

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recall:
    """The task.

    Args:
        n: tokens of a sequence, the question at the end among them, landmarks not.
        marks: marked tokens; the answer is the last one.
        nearest: smallest distance of a mark from the question; the largest is `n - 1`.
        every: a landmark token follows each `every` tokens before the question; 0 for none.
    """

    n: int = 64
    marks: int = 1
    nearest: int = 16
    every: int = 0

    def __post_init__(self) -> None:
        places = self.n - self.nearest
        if self.nearest < 1 or not 1 <= self.marks <= places or self.every < 0:
            raise ValueError(f"Recall: {self.marks} marks do not fit, got {self}")

    def landmarks(self) -> Tensor:
        """Which places hold a landmark, bool `(L,)` with `L = n + (n - 1) // every`."""
        if not self.every:
            return torch.zeros(self.n, dtype=torch.bool)
        length = self.n + (self.n - 1) // self.every
        return torch.arange(length) % (self.every + 1) == self.every

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens `(size, L)` and answers `(size,)`, both int64."""
        ids = torch.randint(VALUES, (size, self.n), generator=generator)
        draws = torch.rand(size, self.n - self.nearest, generator=generator)
        places = draws.topk(self.marks).indices.sort(-1).values
        values = torch.randint(VALUES, (size, self.marks), generator=generator)
        ids.scatter_(1, places, VALUES + values)
        ids[:, -1] = ASK
        marked = self.landmarks()
        out = torch.full((size, len(marked)), LANDMARK)
        out[:, ~marked] = ids
        return out, values[:, -1]


class _Heads(nn.Module):
    """Projections around a function `(q, k, v) -> out`."""

    def __init__(self, attention: Attention, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A layer: attention and a two-layer perceptron, each behind a LayerNorm and added.

    Args:
        attention: maps `(..., width)` to the same.
        width: of the stream.
    """

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Model(nn.Module):
    """A decoder that is read at its last position, with learned positions.

    Args:
        attentions: a module `(B, L, width) -> (B, L, width)` for each layer.
        length: longest sequence.
        width: of the residual stream.
    """

    def __init__(self, attentions: list[nn.Module], length: int, width: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(TOKENS, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Block(one, width) for one in attentions))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VALUES))

    def attend_with(self, make_attention: Callable[[int], Attention]) -> None:
        """Put other functions `(q, k, v) -> out` between the projections of the layers."""
        for at, layer in enumerate(self.layers):
            heads = layer.get_submodule("attention")
            if not isinstance(heads, _Heads):
                raise ValueError("attend_with: the layers were made by make_layer")
            heads.attention = make_attention(at)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the answers `(B, VALUES)` for tokens `(B, L)`."""
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        out: Tensor = self.head(self.layers(x)[:, -1])
        return out


def train(
    make_attention: Callable[[int], Attention] | None = None,
    *,
    make_layer: Callable[[int], nn.Module] | None = None,
    model: Model | None = None,
    task: Recall | None = None,
    steps: int = 600,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    batch: int = 64,
    rate: float = 3e-3,
    quiet: bool = False,
) -> Model:
    """A model trained on the task, in eval mode; the same for the same seed.

    Args:
        make_attention: the function `(q, k, v) -> out` of layer 0, 1, ...
        make_layer: instead of it, the module `(B, N, width) -> (B, N, width)` of each layer.
        model: instead of both, a model that goes on training.
        task: default `Recall()`.
        steps, batch, rate: AdamW with a warm-up and a decay to zero (one cycle).
        seed: of weights and data.
        layers, width, heads: size of the decoder.
        quiet: print no progress to stderr.

    Raises:
        ValueError: not exactly one of `make_attention`, `make_layer` and `model`.
    """
    if sum(x is not None for x in (make_attention, make_layer, model)) != 1:
        raise ValueError("train: expected exactly one of make_attention, make_layer and model")
    task = Recall() if task is None else task
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if model is None:
        parts: list[nn.Module]
        if make_attention is not None:
            parts = [_Heads(make_attention(at), width, heads) for at in range(layers)]
        else:
            assert make_layer is not None
            parts = [make_layer(at) for at in range(layers)]
        model = Model(parts, len(task.landmarks()), width)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        ids, answer = task.batch(batch, generator)
        loss = F.cross_entropy(model(ids), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if not quiet and (step + 1) % 100 == 0:
            print(f"  step {step + 1}/{steps}: loss {loss.item():.3f}", file=sys.stderr)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, task: Recall, trials: int = 1024, seed: int = 1) -> float:
    """Share of right answers on fresh sequences, drawn with another seed than training's."""
    ids, answer = task.batch(trials, torch.Generator().manual_seed(10_000 + seed))
    found = torch.cat([model(part).argmax(-1) for part in ids.split(128)])
    return float((found == answer).float().mean())


def train_recall(
    make_attention: Callable[[int], Attention] | None = None,
    *,
    make_layer: Callable[[int], nn.Module] | None = None,
    task: Recall | None = None,
    steps: int = 600,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    quiet: bool = False,
) -> float:
    """Share of right answers in [0, 1] after :func:`train` with the same arguments."""
    task = Recall() if task is None else task
    model = train(
        make_attention,
        make_layer=make_layer,
        task=task,
        steps=steps,
        seed=seed,
        layers=layers,
        width=width,
        heads=heads,
        quiet=quiet,
    )
    return accuracy(model, task, seed=seed)


def full(layer: int) -> Attention:
    """Causal attention over everything."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q, k, v, mask=Causal())
        return out

    return attention


def recall() -> list[dict[str, Any]]:
    """Full attention on both tasks; seconds are those of training."""
    rows = []
    for marks in (1, 3):
        start = time.perf_counter()
        share = train_recall(full, task=Recall(marks=marks))
        note = f"{share:.1%} right after 600 steps (chance {1 / VALUES:.1%})"
        name = f"recall of the last of {marks}: full attention"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
    return rows


if __name__ == "__main__":
    main((recall,), doc=__doc__)
