"""The loss of a small decoder on characters of text: the bed of two claims about language models."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hybrid_linear_study import VOCAB, Text
from .tiny_recall import Block


class Letters(nn.Module):
    """A decoder of characters; positions are left to its attention.

    Args:
        attentions: a module `(B, N, width)` to the same for each layer.
        width: of the stream.
    """

    def __init__(self, attentions: list[nn.Module], width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.Sequential(*(Block(one, width) for one in attentions))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        """Scores `(B, N, VOCAB)` of the next characters of `ids` `(B, N)`."""
        out: Tensor = self.head(self.layers(self.embed(ids)))
        return out


def letters_loss(
    make_layer: Callable[[int], nn.Module],
    *,
    steps: int = 300,
    length: int = 256,
    width: int = 64,
    batch: int = 16,
    rate: float = 1e-2,
    held_out: int = 64,
) -> float:
    """Nats a character on text not seen in training, of two layers trained on Python's help topics.

    Args:
        make_layer: the module `(B, N, width)` to the same of layer 0 and 1.
        steps, batch, rate: AdamW with a warm-up and a decay to zero (one cycle).
        length: characters of a sequence.
        width: of the stream.
        held_out: sequences of the test.
    """
    torch.manual_seed(0)
    text, generator = Text(length), torch.Generator().manual_seed(0)
    model = Letters([make_layer(at) for at in range(2)], width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        ids, wanted = text.batch(batch, generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}/{steps}: loss {loss.item():.3f}", file=sys.stderr)
    ids, wanted = text.held_out(held_out)
    with torch.no_grad():
        found = torch.cat([model(part) for part in ids.split(batch)])
    return float(F.cross_entropy(found.flatten(0, 1), wanted.flatten()))
