"""BiFormer (arXiv 2303.08810): routing by content against fixed windows, and what it costs.

    python -m benchmarks.biformer [--json] [--only growth|flops] [--train] [--time]

The paper's claims: regions that are chosen by content reach what fixed windows cannot, at k / S^2 of
the score entries of global attention; with the best number of regions the work grows as N^(4/3).
`--train` trains a small network (16 x 16 pixels, 4 x 4 regions, two layers) to say at the first corner
which class the one marked pixel has that lies somewhere outside the corner's region: four regions by
content, the own region only, and all regions (about two minutes). `--time` is the forward pass on a CPU.
Seconds of the other rows are those of working a figure out.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.timing import paired, row
from regard.sparse.biformer import (
    BiLevelRoutingAttention,
    region_attend,
    region_layout,
    route_regions,
)
from regard.sparse.biformer_model import biformer

from . import main
from .counted import slope
from .tiny_recall import Block

CLASSES = 16
PUBLISHED = {"tiny": 2.2e9, "small": 4.5e9, "base": 9.8e9}


def work(side: int, regions: int, topk: int) -> int:
    """Products of width C of a square image in `regions` x `regions`: routing, scores, read-out.

    Pairs are counted in the layout that attention is given.
    """
    index = torch.arange(topk).expand(1, 1, regions**2, topk)
    layout = region_layout(index, (side, side), (side // regions, side // regions))
    return regions**4 + 2 * layout.listed_pairs()


def best(side: int, topk: int) -> tuple[int, int]:
    """The number of regions a side, a divisor of it, that costs least, and what it costs."""
    divisors = [s for s in range(1, side + 1) if side % s == 0 and s**2 >= topk]
    least, regions = min((work(side, s, topk), s) for s in divisors)
    return regions, least


def growth(
    sides: tuple[int, ...] = (48, 80, 96, 144, 192, 240, 320), topk: int = 4
) -> list[dict[str, Any]]:
    """Work over N with the best S, and with S held: stated 4/3, and 2 for N large.

    The first and the last side have a divisor near the best S, which is `(k N^2)^(1/6)`.
    """
    start = time.perf_counter()
    chosen, least = zip(*(best(side, topk) for side in sides), strict=True)
    pixels = [side * side for side in sides]
    held = [work(side, chosen[0], topk) for side in sides]
    dense = [2 * n * n for n in pixels]
    note = (
        f"grows as N^{slope(pixels, least):.3f} with S = {', '.join(map(str, chosen))} "
        f"(stated 1.333), as N^{slope(pixels, held):.3f} with S = {chosen[0]}; "
        f"{dense[-1] / least[-1]:.0f} times less than attention to everything at N={pixels[-1]}"
    )
    name = f"growth over N={pixels[0]}..{pixels[-1]}, k={topk}"
    return [row(name, time.perf_counter() - start, None, None, note)]


@torch.no_grad()
def flops(
    side: int = 224, sizes: tuple[str, ...] = ("tiny", "small", "base")
) -> list[dict[str, Any]]:
    """Multiplications of the three sizes at 224 x 224, against the published figures."""
    rows = []
    for variant in sizes:
        published = PUBLISHED[variant]
        start = time.perf_counter()
        model = biformer(variant).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, side))
        total = counter.get_total_flops() / 2
        note = f"{total / 1e9:.2f} G, published {published / 1e9:.1f} G"
        rows.append(row(f"{variant} at {side}", time.perf_counter() - start, None, None, note))
    return rows


class OwnRegion(BiLevelRoutingAttention):
    """Windows: every region reads itself."""

    def route(self, q: Tensor, k: Tensor, region_size: tuple[int, int]) -> Tensor:
        regions = q.shape[2] // region_size[0] * (q.shape[3] // region_size[1])
        return torch.arange(regions, device=q.device)[None, :, None]


class _ChannelsLast(nn.Module):
    """A module of images `(B, width, Y, X)` for those of `(B, Y, X, width)`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x.movedim(-1, 1)).movedim(1, -1)
        return out


class Corner(nn.Module):
    """Reads an image of classes `(B, side, side)` at its first pixel.

    Args:
        attentions: a module `(B, width, Y, X)` to the same for each layer.
        width: of the stream.
    """

    def __init__(self, attentions: list[nn.Module], width: int) -> None:
        super().__init__()
        # Classes, and the question at the corner.
        self.embed = nn.Embedding(CLASSES + 1, width)
        self.mark = nn.Parameter(torch.randn(width))
        self.layers = nn.Sequential(*(Block(_ChannelsLast(one), width) for one in attentions))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, ids: Tensor, marked: Tensor) -> Tensor:
        """Scores of the classes, `(B, CLASSES)`, from ids and a bool `(B, side, side)`."""
        x = self.embed(ids) + marked[..., None] * self.mark
        out: Tensor = self.head(self.layers(x)[:, 0, 0])
        return out


def batch(
    size: int, side: int, region: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Images `(size, side, side)`, the one marked pixel of each, outside the first region, its class."""
    ids = torch.randint(CLASSES, (size, side, side), generator=generator)
    at = torch.arange(side * side)
    outside = at[(at // side >= region) | (at % side >= region)]
    place = outside[torch.randint(len(outside), (size,), generator=generator)]
    ids[:, 0, 0] = CLASSES
    marked = (at == place[:, None]).view(size, side, side)
    return ids, marked, ids[marked]


def train(
    kind: type[BiLevelRoutingAttention],
    topk: int,
    *,
    side: int = 16,
    n_win: int = 4,
    steps: int = 300,
    size: int = 32,
    width: int = 64,
    heads: int = 2,
    layers: int = 2,
    rate: float = 3e-3,
    seed: int = 0,
) -> tuple[float, list[float]]:
    """Share of right answers after training, and the losses."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Corner([kind(width, heads, n_win, topk) for _ in range(layers)], width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    losses = []
    for step in range(steps):
        ids, marked, answer = batch(size, side, side // n_win, generator)
        loss = F.cross_entropy(model(ids, marked), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}/{steps}: loss {losses[-1]:.3f}", file=sys.stderr)
    model.eval()
    ids, marked, answer = batch(
        1024, side, side // n_win, torch.Generator().manual_seed(10_000 + seed)
    )
    with torch.no_grad():
        parts = zip(ids.split(128), marked.split(128), strict=True)
        found = torch.cat([model(*part).argmax(-1) for part in parts])
    return float((found == answer).float().mean()), losses


def corner(steps: int = 300) -> list[dict[str, Any]]:
    """Train on the class of the marked pixel, by what a region reads."""
    kinds: list[tuple[str, type[BiLevelRoutingAttention], int]] = [
        ("4 of 16 regions by content", BiLevelRoutingAttention, 4),
        ("its own region", OwnRegion, 1),
        ("all 16 regions", BiLevelRoutingAttention, 16),
    ]
    rows = []
    for name, kind, topk in kinds:
        start = time.perf_counter()
        share, losses = train(kind, topk, steps=steps)
        note = (
            f"{share:.1%} right after {steps} steps (chance {1 / CLASSES:.1%}), loss {losses[0]:.2f} "
            f"to {sum(losses[-20:]) / 20:.2f}; {topk / 16:.1%} of the score entries"
        )
        rows.append(row(f"corner: {name}", time.perf_counter() - start, None, None, note))
    return rows


@torch.no_grad()
def seconds(
    side: int = 56, width: int = 64, heads: int = 2, n_win: int = 7
) -> list[dict[str, Any]]:
    """Routing and attention of one layer over global attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, side, side, width // heads, generator=generator) for _ in range(3)
    )
    region = side // n_win, side // n_win

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))

    rows = []
    for topk in (1, 4, 16, n_win**2):

        def ours(topk: int = topk) -> Tensor:
            return region_attend(q, k, v, route_regions(q, k, region, topk), region)

        bound = n_win**2 / topk
        name = f"forward, {side} x {side}, C={width}, S={n_win}, k={topk}"
        rows.append(row(name, *paired(ours, dense), bound, "over SDPA of all pixels"))
    return rows


if __name__ == "__main__":
    main((growth, flops), {"train": corner, "time": seconds}, doc=__doc__)
