"""MambaOut (arXiv 2405.07992): is the state space missed on small images? And counted work.

    python -m benchmarks.mambaout [--json] [--only growth]
    python -m benchmarks.mambaout --train --only train

`train` teaches two networks of three blocks to read digits drawn at random places with noise: gated
CNN blocks as they are, and the same with a selective scan behind each convolution, as in Mamba.
`ours` and `theirs` are seconds a step without and with it. `growth` counts multiplications.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.timing import row
from regard.core.scan import selective_scan
from regard.linear.mambaout import GatedCNNBlock

from . import main
from .counted import slope

# Digits of a display with 5 rows of 3 dots.
_FONT = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001001001", "111101111101111", "111101111001111",
)  # fmt: skip
_SIDE = 14


def digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images `(count, 1, 14, 14)` of digits at twice their size with noise, and the digits."""
    font = torch.tensor([[float(dot) for dot in word] for word in _FONT]).view(10, 5, 3)
    font = font.repeat_interleave(2, 1).repeat_interleave(2, 2)
    label = torch.randint(0, 10, (count,), generator=generator)
    top = torch.randint(0, _SIDE - 9, (count,), generator=generator)
    left = torch.randint(0, _SIDE - 5, (count,), generator=generator)
    image = torch.randn(count, 1, _SIDE, _SIDE, generator=generator) * 0.3
    for at in range(count):
        y, x = int(top[at]), int(left[at])
        image[at, 0, y : y + 10, x : x + 6] += font[label[at]]
    return image, label


class _Scanned(GatedCNNBlock):
    """The block with Mamba's selective scan over the image, row by row, behind its convolution."""

    def __init__(self, dim: int, states: int = 8) -> None:
        super().__init__(dim, kernel=3)
        width = self.sizes[2]
        self.project = nn.Linear(width, 2 * states + 1)
        self.rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.spread = nn.Parameter(torch.zeros(width))
        self.skip = nn.Parameter(torch.ones(width))
        self.states = states

    def forward(self, x: Tensor) -> Tensor:
        gate, same, mixed = self.fc1(self.norm(x)).split(self.sizes, dim=-1)
        mixed = F.silu(self.conv(mixed.movedim(-1, 1))).flatten(2)
        b, c, delta = self.project(mixed.mT).split([self.states, self.states, 1], dim=-1)
        scanned = selective_scan(
            mixed,
            delta.mT.expand_as(mixed),
            -self.rate.exp(),
            b.mT[:, None],
            c.mT[:, None],
            self.skip,
            delta_bias=self.spread,
        )
        mixed = scanned.unflatten(2, x.shape[1:3]).movedim(1, -1)
        out: Tensor = x + self.fc2(F.gelu(gate) * torch.cat([same, mixed], dim=-1))
        return out


def _network(scan: bool) -> nn.Module:
    blocks = [_Scanned(24) if scan else GatedCNNBlock(24, kernel=3) for _ in range(3)]
    stem = nn.Conv2d(1, 24, 3, stride=2, padding=1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.blocks(self.stem(x).movedim(1, -1)).mean((1, 2)))
            return found

    return Net()


def accuracy(scan: bool, seed: int = 0, steps: int = 250) -> tuple[float, float, int]:
    """Share of unseen digits read after training, seconds a step, and parameters."""
    torch.manual_seed(seed)
    net = _network(scan)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    begin = time.perf_counter()
    for step in range(steps):
        image, label = digits(64, generator)
        loss = F.cross_entropy(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 125 == 124:
            print(f"  scan={scan} step {step + 1}: loss {loss.item():.3f}", file=sys.stderr)
    taken = (time.perf_counter() - begin) / steps
    image, label = digits(1000, torch.Generator().manual_seed(99))
    with torch.no_grad():
        right = (net(image).argmax(-1) == label).double().mean().item()
    return right, taken, sum(p.numel() for p in net.parameters())


def train() -> list[dict[str, Any]]:
    """Digits read without and with a state space, two seeds each."""
    plain, scanned = ([accuracy(scan, seed) for seed in (0, 1)] for scan in (False, True))
    shares = [" / ".join(f"{run[0]:.3f}" for run in runs) for runs in (plain, scanned)]
    note = (
        f"read without {shares[0]} ({plain[0][2]:,} parameters), with a selective scan {shares[1]} "
        f"({scanned[0][2]:,})"
    )
    return [row("drawn digits, a training step", plain[0][1], scanned[0][1], note=note)]


def growth() -> list[dict[str, Any]]:
    """Multiplications of one block over the pixels."""
    block, sides, work = GatedCNNBlock(16), (16, 32, 64, 128), []
    for side in sides:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(torch.zeros(1, side, side, 16))
        work.append(counter.get_total_flops())
    pixels = [side * side for side in sides]
    note = f"operations grow as N^{slope(pixels, work):.2f} from {pixels[0]} to {pixels[-1]} pixels"
    return [{**row("growth of a block", 0.0), "ours": None, "note": note}]


if __name__ == "__main__":
    main([growth], {"train": train}, __doc__)
