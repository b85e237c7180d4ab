"""CLEAR (arXiv 2412.16112): circular windows against dense attention.

    python -m benchmarks.clear [--json] [--only reduction|growth|speed] [--train]

The paper's claims: at 8K (512 x 512 tokens and 512 of text) a radius of 8 keeps 0.46 % of the pairs, a
reduction of 99.5 %; and a pre-trained model is distilled into it by its attention weights alone
(`--train`, on a small model). Its cost: pairs grow linearly in the tokens at a fixed radius.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.timing import paired, row, seconds
from regard.patterns.clear import Clear, clear_attention
from regard.patterns.clear_distill import (
    attention_outputs,
    distillation_loss,
    train_attention_only,
)
from regard.patterns.clear_module import ClearAttention

from . import main

RADII = (8, 16, 32)


def reduction(text: int = 512) -> list[dict[str, Any]]:
    """Points of a circle, and the share of pairs that it saves at 1K and 8K images."""
    rows = []
    for radius in RADII:
        small, large = (Clear(side, side, radius, text) for side in (64, 512))
        saved = [1 - mask.pairs() / mask.tokens**2 for mask in (small, large)]
        note = (
            f"{large.circle} points a circle (π r² = {math.pi * radius**2:.0f}); pairs saved: "
            f"{saved[0]:.1%} at 1K, {saved[1]:.2%} at 8K"
        )
        rows.append(row(f"r={radius}", seconds(large.pairs, repeats=1), None, None, note))
    return rows


def growth(radius: float = 8) -> list[dict[str, Any]]:
    """Growth of allowed and of listed pairs over N = 1k..64k at a fixed radius: stated 1."""
    sides = (32, 64, 128, 256)
    masks = [Clear(side, side, radius) for side in sides]
    layouts = [mask.layout(mask.tokens, None, 64) for mask in masks]
    found = []
    for pairs in ([m.pairs() for m in masks], [layout.listed_pairs() for layout in layouts]):
        found.append(math.log(pairs[-1] / pairs[0]) / (2 * math.log(sides[-1] / sides[0])))
    taken = seconds(lambda: masks[-1].layout(masks[-1].tokens, None, 64), repeats=1, warmup=0)
    note = (
        f"allowed pairs grow as N^{found[0]:.2f}, listed as N^{found[1]:.2f} (stated 1); "
        "seconds are those of the layout at 64k"
    )
    return [row(f"growth over N=1k..64k, r={radius}", taken, None, None, note)]


@torch.no_grad()
def speed(side: int = 96, text: int = 64) -> list[dict[str, Any]]:
    """Forward pass over dense attention; the bound is that of the allowed pairs."""
    rows = []
    for radius in RADII:
        mask = Clear(side, side, radius, text)
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 8, mask.tokens, 64, generator=g) for _ in range(3))
        options: dict[str, Any] = {"grid": (side, side), "radius": radius, "text": text}
        taken = paired(
            lambda x=(q, k, v), o=options: clear_attention(*x, **o),
            lambda x=(q, k, v): F.scaled_dot_product_attention(*x),
            repeats=3,
        )
        bound = mask.tokens**2 / mask.pairs()
        listed = mask.layout(mask.tokens, None, (128, 64)).density
        note = f"{1 / bound:.2%} of pairs allowed, {listed:.2%} in blocks of 128 x 64"
        rows.append(row(f"{side} x {side} + {text}, r={radius}: over dense", *taken, bound, note))
    return rows


class Block(nn.Module):
    """A single-stream block: attention beside the feed-forward, modulated by time."""

    def __init__(self, dim: int, heads: int, attention: dict[str, Any]) -> None:
        super().__init__()
        self.attn = ClearAttention(dim, heads, **attention)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.shape, self.inner = nn.Linear(dim, 3 * dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        shift, scale, gate = self.shape(when)[:, None].chunk(3, -1)
        y = self.norm(x) * (1 + scale) + shift
        return x + gate * self.proj(torch.cat([self.attn(y), F.gelu(self.inner(y))], -1))


class Denoiser(nn.Module):
    """A small image transformer: text tokens by class, an image of `side x side` tokens."""

    def __init__(self, side: int, channels: int, classes: int, dim: int = 48, **attention: Any):
        super().__init__()
        attention |= {"grid": (side, side), "text": 4}
        self.embed, self.text = nn.Linear(channels, dim), nn.Embedding(classes, 4 * dim)
        self.places = nn.Parameter(torch.randn(4 + side * side, dim) * 0.2)
        self.when = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, 4, attention) for _ in range(4))
        self.out = nn.Linear(dim, channels)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        angle = sigma[:, None] * torch.logspace(0, 2, 8)
        when = self.when(torch.cat([angle.sin(), angle.cos()], -1))
        words = self.text(label).unflatten(-1, (4, -1))
        h = torch.cat([words, self.embed(x)], 1) + self.places
        for block in self.blocks:
            h = block(h, when)
        out: Tensor = self.out(h[:, 4:])
        return out


def _images(count: int, side: int, classes: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gratings of `2 side` pixels: the class tells the direction, width and phase are random."""
    label = torch.randint(classes, (count,), generator=g)
    angle = label * math.pi / classes
    wave, phase = torch.rand(2, count, 1, 1, generator=g) * 0.4 + torch.tensor([[[[0.5]]], [[[0]]]])
    at = torch.arange(2.0 * side)
    along = at[:, None] * angle.sin()[:, None, None] + at * angle.cos()[:, None, None]
    image = torch.sin(along * wave + phase * 15)
    patches = image.unflatten(1, (side, 2)).unflatten(3, (side, 2)).transpose(2, 3)
    return patches.flatten(3).flatten(1, 2), label


def train(side: int = 8, radius: float = 2, steps: int = 250) -> list[dict[str, Any]]:
    """Distil a small flow-matching model with full attention into circles; errors before and after."""
    torch.manual_seed(0)
    classes, g = 6, torch.Generator().manual_seed(0)

    def batch(count: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, label = _images(count, side, classes, g)
        noise, sigma = torch.randn(image.shape, generator=g), torch.rand(count, generator=g)
        mixed = torch.lerp(image, noise, sigma[:, None, None])
        return mixed, sigma, label, noise - image

    start = time.perf_counter()
    teacher = Denoiser(side, 4, classes, radius=None)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(2 * steps):
        *inputs, target = batch()
        optimizer.zero_grad()
        F.mse_loss(teacher(*inputs), target).backward()
        optimizer.step()
    teacher.eval().requires_grad_(False)

    student = copy.deepcopy(teacher)
    for block in student.blocks:
        block.attn.radius = radius
    *held, wanted = batch(128)
    goal = teacher(*held)

    def errors() -> tuple[float, float]:
        with torch.no_grad():
            found = student(*held)
        return F.mse_loss(found, wanted).item(), F.mse_loss(found, goal).item()

    before, flow = errors(), F.mse_loss(goal, wanted).item()
    optimizer = torch.optim.Adam(train_attention_only(student), lr=1e-3)
    # The authors compare every fourth block of 38; here every second of 4.
    pair = [[block.attn for block in net.blocks][::2] for net in (student, teacher)]
    with attention_outputs(pair[0]) as mine, attention_outputs(pair[1]) as theirs:
        for _ in range(steps):
            *inputs, target = batch()
            prediction, aim = student(*inputs), teacher(*inputs)
            optimizer.zero_grad()
            distillation_loss(prediction, target, aim, mine, theirs).total.backward()
            optimizer.step()
            mine.clear()
            theirs.clear()
    after, taken = errors(), time.perf_counter() - start
    kept = Clear(side, side, radius, 4).pairs() / (side * side + 4) ** 2
    note = (
        f"{kept:.0%} of pairs; flow error: teacher {flow:.4f}, circles {before[0]:.4f} before and "
        f"{after[0]:.4f} after; distance from the teacher {before[1]:.4f} before, {after[1]:.4f} after"
    )
    return [row(f"distilled in {steps} steps, r={radius}", taken, None, None, note)]


if __name__ == "__main__":
    main((reduction, growth, speed), {"train": train}, doc=__doc__)
