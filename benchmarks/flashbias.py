"""FlashBias (arXiv 2505.12044): a bias as extra channels against a dense one.

    python -m benchmarks.flashbias [--json]

The paper's claim: the same outputs without the N x M bias, at the cost of plain attention; and biases
of practice have a low rank. Its cost: time O(N M (D + R)), extra memory O((N + M) R).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import ALiBi, Causal, attend
from regard.bench.timing import paired, row, seconds
from regard.patterns.flashbias import alibi_factors, factored_bias_attention, svd_factors

from . import main

H, D = 8, 64


def _qkv(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(1, H, n, D, generator=g) for _ in range(3)]


def _dense_bias(n: int) -> Tensor:
    """Causal ALiBi as one would write it for SDPA, `(H, n, n)`."""
    at = torch.arange(n)
    bias = ALiBi.for_heads(H).slopes[:, None, None] * (at - at[:, None]).float()
    return bias.masked_fill_(at > at[:, None], -math.inf)


def alibi(n: int = 4096) -> list[dict[str, Any]]:
    """ALiBi factored, over making the bias and handing it to SDPA, and over no bias at all."""
    q, k, v = _qkv(n)

    def factored() -> Tensor:
        return factored_bias_attention(q, k, v, *alibi_factors(n, n, H), causal=True)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_dense_bias(n))

    gap = (factored() - dense()).abs().max().item()
    ours, theirs = paired(factored, dense, repeats=3)
    factors = sum(x.untyped_storage().nbytes() for x in alibi_factors(n, n, H)) / 1e6
    note = f"{4 * H * n * n / 1e6:.0f} MB of bias, {factors:.1f} MB of factors; gap {gap:.0e}"
    rows = [row(f"ALiBi N={n}: factored over dense bias", ours, theirs, None, note)]
    ours, theirs = paired(factored, lambda: attend(q, k, v, mask=Causal()), repeats=3)
    note = "what the bias costs: 1 means nothing"
    return [*rows, row(f"ALiBi N={n}: over no bias", ours, theirs, 1.0, note)]


def ranks(side: int = 12) -> list[dict[str, Any]]:
    """Rank that keeps 99.5 % of the energy of a window's bias: smooth and random tables."""
    at = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side)))
    smooth = -torch.cdist(at, at)
    table = torch.randn(2 * side - 1, 2 * side - 1, generator=torch.Generator().manual_seed(0))
    offset = (at[:, None] - at[None] + side - 1).long()
    random = table[offset[..., 0], offset[..., 1]]
    found = [svd_factors(bias)[0].shape[-1] for bias in (smooth, random)]
    note = f"rank {found[0]} of {side**2} for -distance, {found[1]} for a random table"
    taken = seconds(lambda: svd_factors(smooth))
    return [row(f"rank at 99.5 % energy, {side} x {side} window", taken, None, None, note)]


def growth(sizes: tuple[int, ...] = (1024, 2048, 4096)) -> list[dict[str, Any]]:
    """Growth with N, as slopes of log over log: time 2, memory of the factors 1 (dense: 2)."""
    taken, held = [], []
    for n in sizes:
        q, k, v = _qkv(n)
        phi_q, phi_k = alibi_factors(n, n, H)
        taken.append(
            seconds(lambda x=(q, k, v, phi_q, phi_k): factored_bias_attention(*x, causal=True))
        )
        held.append(phi_q.untyped_storage().nbytes() + phi_k.untyped_storage().nbytes())
    time, memory = _slope(sizes, taken), _slope(sizes, held)
    note = f"time grows as N^{time:.2f} (stated 2), factors as N^{memory:.2f} (stated 1)"
    return [row(f"growth over N={sizes[0]}..{sizes[-1]}", taken[-1], None, None, note)]


def _slope(x: tuple[int, ...], y: list[Any]) -> float:
    return math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])


if __name__ == "__main__":
    main((alibi, ranks, growth), doc=__doc__)
