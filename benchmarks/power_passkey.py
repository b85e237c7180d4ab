"""Passkey retrieval of a small model trained from scratch: for `python -m benchmarks.power --train`.

A sequence of noise holds one passkey, a token of its own kind, at a random place. At the last
position the model must say which it was. Loss is taken at every position from the passkey on, so that
the model may learn to hand it on. Answers can only come from inside the receptive field of the last
position, which grows with the pattern; the two patterns read equally many keys a row at most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import Mask, attend

NOISE, KEYS = 16, 16


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """A decoder without positions, which this task does not need.

    Args:
        mask: of every layer and head.
        layers, dim, heads: size.
    """

    def __init__(self, mask: Mask, layers: int, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.mask = mask
        self.embed = nn.Embedding(NOISE + KEYS, dim)
        self.layers = nn.ModuleList(_Layer(dim, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, KEYS))

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the passkeys at every position, `(B, N, KEYS)`, for tokens `(B, N)`."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.head(x)


def sample(place: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences `(B, n)` with a passkey at each `place` `(B,)`, and which it is `(B,)`."""
    ids = torch.randint(NOISE, (len(place), n), generator=generator)
    key = torch.randint(KEYS, (len(place),), generator=generator)
    ids[torch.arange(len(place)), place] = NOISE + key
    return ids, key


def train(
    mask: Mask, n: int, layers: int, steps: int, seed: int = 0, batch: int = 16, rate: float = 1e-2
) -> Model:
    """A model trained on `steps` batches of sequences of `n` tokens; the same for the same seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model(mask, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        place = torch.randint(n - 1, (batch,), generator=generator)
        ids, key = sample(place, n, generator)
        after = torch.arange(n) >= place[:, None]
        loss = F.cross_entropy(model(ids)[after], key[:, None].expand(batch, n)[after])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Model, n: int, trials: int, seed: int = 1) -> Tensor:
    """Share of right answers at the last position for a passkey at each place, `(n - 1,)`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place in range(n - 1):
        ids, key = sample(torch.full((trials,), place), n, generator)
        found.append((model(ids)[:, -1].argmax(-1) == key).float().mean())
    return torch.stack(found)
