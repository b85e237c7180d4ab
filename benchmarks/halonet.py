"""HaloNet (arXiv 2103.12731): blocks with halos against dense attention.

    python -m benchmarks.halonet [--json] [--only storage|equivariance|growth|speed]

The paper's claims: keys are stored (b + 2h)^2 / b^2 times a pixel, 3.06 for b = 8 and h = 3 where
windows of 7 x 7 around every pixel store 49; translation by whole blocks commutes with the layer,
by less it does not. Its cost: time O(Y X (b + 2h)^2 D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.timing import paired, row, seconds
from regard.patterns.halonet import Halo, HaloAttention, halo_attention

from . import main


def storage(block: int = 8, halo: int = 3) -> list[dict[str, Any]]:
    """Keys stored for every pixel: windows shared by a block against one window a pixel.

    Counted in the layout of an image so large that borders do not matter.
    """
    mask = Halo((64 * block, 64 * block), block, halo, padded=True)
    layout = mask.layout(mask.queries, mask.keys, mask.exact_blocks)
    stored = layout.listed_pairs() / mask.exact_blocks[0] / mask.queries
    single = (2 * halo + 1) ** 2
    note = (
        f"{stored:.2f} keys a pixel, {single} with a {2 * halo + 1} x {2 * halo + 1} window each: "
        f"{single / stored:.0f} times fewer"
    )
    taken = seconds(lambda: mask.layout(mask.queries, mask.keys, mask.exact_blocks), repeats=1)
    return [row(f"storage, b={block} h={halo}", taken, None, None, note)]


@torch.no_grad()
def equivariance(block: int = 4, halo: int = 1, side: int = 24) -> list[dict[str, Any]]:
    """Difference between shifting before and after the layer, away from borders."""
    torch.manual_seed(0)
    layer = HaloAttention(16, heads=2, block=block, halo=halo).double()
    x = torch.randn(1, 16, side, side, dtype=torch.float64)
    inner = slice(2 * block, side - 2 * block)
    rows = []
    for shift in (1, 2, block):
        before = layer(x.roll((shift, shift), (2, 3)))
        after = layer(x).roll((shift, shift), (2, 3))
        gap = (before - after)[..., inner, inner].abs().max().item()
        taken = seconds(lambda: layer(x), repeats=1)
        note = f"largest difference {gap:.2g} for blocks of {block}"
        rows.append(row(f"shift by {shift}", taken, None, None, note))
    return rows


def growth(block: int = 8, halo: int = 3) -> list[dict[str, Any]]:
    """Growth of the listed pairs over N = 1k..64k: stated 1."""
    sides = (32, 64, 128, 256)
    pairs = []
    for side in sides:
        mask = Halo((side, side), block, halo, padded=True)
        pairs.append(mask.layout(mask.queries, mask.keys, mask.exact_blocks).listed_pairs())
    slope = math.log(pairs[-1] / pairs[0]) / (2 * math.log(sides[-1] / sides[0]))
    mask = Halo((sides[-1], sides[-1]), block, halo)
    taken = seconds(lambda: mask.layout(mask.queries, mask.keys, mask.exact_blocks), repeats=1)
    note = f"pairs grow as N^{slope:.3f} (stated 1); seconds are those of the layout at 64k"
    return [row("growth over N=1k..64k", taken, None, None, note)]


@torch.no_grad()
def speed(side: int = 96, block: int = 8, halo: int = 3) -> list[dict[str, Any]]:
    """Forward pass on a grid, over dense attention and over unfolded windows."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, side, side, 64, generator=g) for _ in range(3))
    mask = Halo((side, side), block, halo)
    bound = 1 / mask.layout(side**2, side**2, mask.exact_blocks).density

    def ours() -> Tensor:
        return halo_attention(q, k, v, block, halo)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))

    def unfolded() -> Tensor:
        """As timm does it: every window copied, then batched products (borders take part)."""
        window = mask.window
        cut = q.unflatten(2, (-1, block)).unflatten(4, (-1, block)).transpose(3, 4)
        keys, values = (
            F.pad(x, [0, 0, halo, halo, halo, halo])
            .unfold(2, window, block)
            .unfold(3, window, block)
            .permute(0, 1, 2, 3, 5, 6, 4)
            .flatten(4, 5)
            for x in (k, v)
        )
        scores = cut.flatten(4, 5) @ keys.transpose(-1, -2) * 64**-0.5
        return scores.softmax(-1) @ values

    rows = []
    for name, theirs, most in (("dense", dense, bound), ("unfolded windows", unfolded, None)):
        taken = paired(ours, theirs, repeats=3)
        note = f"density {1 / bound:.4f}"
        rows.append(row(f"{side} x {side}, b={block} h={halo}: over {name}", *taken, most, note))
    return rows


if __name__ == "__main__":
    main((storage, equivariance, growth, speed), doc=__doc__)
