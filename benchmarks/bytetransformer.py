"""ByteTransformer (arXiv 2210.03052): an encoder layer without padding against the padded one.

    python -m benchmarks.bytetransformer [--json]

The paper's claim: with lengths uniform on [0.2 S, S], token-wise work drops to 0.6 of the padded and
attention to 0.42. Its cost: time O(Σ l C^2 + Σ l^2 C).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.timing import paired, row, seconds
from regard.core.varlen import pack
from regard.patterns.bytetransformer import PackedEncoderLayer

from . import main


def _lengths(batch: int, side: int) -> Tensor:
    """Evenly spaced on [0.2 S, S]: the paper's distribution without its noise."""
    return torch.linspace(0.2 * side, side, batch).round().long()


def _layers(dim: int) -> tuple[nn.TransformerEncoderLayer, PackedEncoderLayer]:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        dim, dim // 64, 4 * dim, dropout=0.0, activation="gelu", batch_first=True
    ).eval()
    return theirs, PackedEncoderLayer.from_torch(theirs)


def _work(lengths: Tensor, dim: int) -> float:
    """Multiply-adds of one layer: projections and feed-forward, then the two products."""
    size = lengths.double()
    return float(12 * dim**2 * size.sum() + 2 * dim * size.square().sum())


@torch.no_grad()
def layer(batch: int = 8, side: int = 384, dim: int = 384) -> list[dict[str, Any]]:
    """One encoder layer, packing and padding included, over PyTorch's padded layer."""
    theirs, ours = _layers(dim)
    lengths = _lengths(batch, side)
    valid = torch.arange(side) < lengths[:, None]
    x = torch.randn(batch, side, dim)

    def padded() -> Tensor:
        # Without gradients PyTorch may leave padded rows as they are; only valid rows are compared.
        out: Tensor = theirs(x, src_key_padding_mask=~valid)
        return out

    gap = (padded() - ours.padded(x, lengths))[valid].abs().max().item()
    ours_s, theirs_s = paired(lambda: ours.padded(x, lengths), padded)
    tokens = lengths.sum().item() / (batch * side)
    area = lengths.double().square().sum().item() / (batch * side**2)
    bound = _work(torch.full((batch,), side), dim) / _work(lengths, dim)
    note = f"tokens {tokens:.2f}, attention area {area:.2f} of padded; gap {gap:.0e}"
    name = f"encoder layer B={batch} S={side} C={dim}: packed over padded"
    return [row(name, ours_s, theirs_s, bound, note)]


@torch.no_grad()
def growth(dim: int = 128) -> list[dict[str, Any]]:
    """Growth with the number and the length of sequences, beside that of the multiply-adds."""
    rows = []
    batches, sides = ((4, 512), (16, 512)), ((4, 512), (4, 2048))
    for what, sizes in (("number of sequences", batches), ("length", sides)):
        taken, work = [], []
        for batch, side in sizes:
            _, ours = _layers(dim)
            lengths = _lengths(batch, side)
            packed = pack(torch.randn(batch, side, dim), lengths)
            taken.append(
                seconds(lambda x=packed, net=ours: net(x.x, x.cu_seqlens), repeats=5, warmup=2)
            )
            work.append(_work(lengths, dim))
        found, stated = (math.log(y[1] / y[0]) / math.log(4) for y in (taken, work))
        note = f"power {found:.2f}, of the multiply-adds {stated:.2f}"
        rows.append(row(f"growth with the {what}", taken[1], None, None, note))
    return rows


if __name__ == "__main__":
    main((layer, growth), doc=__doc__)
