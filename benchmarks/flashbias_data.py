"""Small data for `benchmarks/flashbias.py`: point clouds, window tables, folded chains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import RelativeBias2D, attend


def cloud(n: int, dims: int, heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points in a unit box, a weight for each head and point, and a smooth field on them.

    Returns:
        `(1, 1, n, dims)`, `(1, heads, n, 1)` positive, `(1, 1, n, 1)`: the potential of five
        charges, the solution of a Poisson equation with softened point sources, of unit variance.
    """
    g = torch.Generator().manual_seed(seed)
    x, at = torch.rand(1, 1, n, dims, generator=g), torch.rand(5, dims, generator=g)
    weight = 20 * torch.rand(1, heads, n, 1, generator=g)
    charge = torch.randn(5, generator=g)
    field = ((x[0, 0, :, None] - at).square().sum(-1) + 0.02).log() @ charge
    return x, weight, ((field - field.mean()) / field.std())[None, None, :, None]


def window_tables(side: int) -> tuple[Tensor, Tensor]:
    """The biases of a window of `side x side` tokens: `-distance`, and a table of random numbers."""
    at = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side)))
    table = torch.randn(2 * side - 1, 2 * side - 1, generator=torch.Generator().manual_seed(0))
    offset = (at[:, None] - at[None] + side - 1).long()
    return -torch.cdist(at, at), table[offset[..., 0], offset[..., 1]]


def relative_bias(table: Tensor, side: int) -> Tensor:
    """The bias `(H, side^2, side^2)` of a Swin table `(H, 2 side - 1, 2 side - 1)`."""
    at = torch.arange(side * side)
    heads = torch.arange(table.shape[0])[:, None, None]
    return RelativeBias2D(table, (side, side)).scores(at[:, None], at[None, :], heads)


def denoised_table(side: int, steps: int, heads: int = 4) -> Tensor:
    """A table learnt by gradient: attention under it averages noise away from smooth images.

    Returns:
        `(heads, 2 side - 1, 2 side - 1)`.
    """
    g = torch.Generator().manual_seed(0)
    table = (0.02 * torch.randn(heads, 2 * side - 1, 2 * side - 1, generator=g)).requires_grad_()
    adam = torch.optim.Adam([table], lr=0.1)
    flat = torch.zeros(1, heads, side * side, 8)
    for _ in range(steps):
        # Smooth images: coarse noise, enlarged; each head's images are coarser than the last one's.
        images = torch.cat(
            [
                F.interpolate(
                    torch.randn(1, 8, 3 + h, 3 + h, generator=g), (side, side), mode="bicubic"
                )
                for h in range(heads)
            ]
        )
        clean = images.flatten(2).transpose(1, 2)[None]
        noisy = clean + torch.randn(clean.shape, generator=g)
        out = attend(flat, flat, noisy, bias=RelativeBias2D(table, (side, side)))
        adam.zero_grad()
        (out - clean).square().mean().backward()
        adam.step()
    return table.detach()


def chains(
    count: int, residues: int, channels: int = 16, heads: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random folded chains, with the pair bias that a layer would compute of them.

    The pair tensor holds, for each two residues, soft bins of their distance and of their distance
    along the chain, mixed into `channels`; the bias is a linear layer of its LayerNorm, as in
    triangle attention (AlphaFold 3, algorithm 14).

    Returns:
        pair `(count, residues, residues, channels)`, single features `(count, residues, F)`, and
        bias `(count, heads, residues, residues)`.
    """
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, residues, 3, generator=g)
    steps = F.avg_pool1d(steps.transpose(1, 2), 5, 1, 2).transpose(1, 2)
    at = F.normalize(steps, dim=-1).cumsum(1)
    at = at - at.mean(1, keepdim=True)
    apart = torch.cdist(at, at)
    along = (torch.arange(residues)[:, None] - torch.arange(residues)).float().expand_as(apart)
    centres = torch.linspace(0, 1, 8)
    bins = [
        (-8 * (x[..., None] / reach - centres).square()).exp()
        for x, reach in ((apart, 16.0), (along.abs(), float(residues)))
    ]
    mix = torch.randn(16, channels, generator=g) / 4
    pair = torch.cat(bins, -1) @ mix
    out = torch.randn(channels, heads, generator=g) * (2 / channels**0.5)
    bias = (F.layer_norm(pair, (channels,)) @ out).permute(0, 3, 1, 2)
    index = torch.arange(residues)[:, None] / residues
    waves = torch.cat([(2**p * 3.14 * index).cos() for p in range(4)], -1)
    constant = torch.ones(count, residues, 1)
    single = torch.cat(
        [at / 8, index.expand(count, -1, 1), waves.expand(count, -1, 4), constant], -1
    )
    return pair, single, bias.contiguous()
