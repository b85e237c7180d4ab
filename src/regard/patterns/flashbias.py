"""FlashBias: attention with an additive bias of low rank, at the cost of plain attention.

Liu et al., "FlashBias: Fast Computation of Attention with Bias", arXiv 2505.12044. A bias
`b = Φ_q Φ_k^T` of rank `R` is `R` more channels of the queries and keys (eq. 4):

    softmax(τ q k^T + Φ_q Φ_k^T) v = softmax([τ q | Φ_q] [k | Φ_k]^T) v

so the `N x M` bias is never stored. `τ` multiplies `q k^T` alone. The factors come from a formula
(`flashbias_exact`: ALiBi, squared distances, ...), from a singular value decomposition of a fixed
table, or from small networks trained for a bias that changes (`flashbias_fitted`). All are public
here.

The authors' code has `+m (i - j)` in its ALiBi module, the opposite sign of the ALiBi paper
(arXiv 2108.12409); here it is the decaying `m (j - i)`.
"""

from __future__ import annotations

from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.bias import LowRankBias
from regard.core.masks import Causal, Mask

from .flashbias_exact import (
    alibi_factors,
    cosine_factors,
    group_factors,
    haversine_factors,
    join_factors,
    multiply_channels,
    polynomial_factors,
    sqdist_factors,
)
from .flashbias_fitted import (
    NeuralBiasFactors,
    RankError,
    pair_features,
    rank_curve,
    svd_factors,
    train_factors,
)

__all__ = [
    "CARD",
    "NeuralBiasFactors",
    "RankError",
    "alibi_factors",
    "cosine_factors",
    "factored_bias_attention",
    "group_factors",
    "haversine_factors",
    "join_factors",
    "multiply_channels",
    "pair_features",
    "polynomial_factors",
    "rank_curve",
    "sqdist_factors",
    "svd_factors",
    "train_factors",
]

CARD = Card(
    key="flashbias",
    title="FlashBias: Fast Computation of Attention with Bias",
    arxiv="2505.12044",
    family="kernel",
    entry="regard.patterns.flashbias:factored_bias_attention",
    definition="tests/patterns/test_flashbias.py::test_equals_attention_with_the_dense_bias",
    oracle="python -m tests.golden tests/golden/data/flashbias.npz",
    claim="python -m benchmarks.flashbias",
    cost="python -m benchmarks.flashbias --only growth",
    note="ALiBi with the sign of its own paper; the authors' module has the opposite one.",
)


def factored_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Attention with the bias `q_bias @ k_bias^T`, which is never multiplied out.

    Args:
        q: `(B, H, N, D)`.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`.
        q_bias: `Φ_q`, broadcastable to `(B, H, N, R)`.
        k_bias: `Φ_k`, broadcastable to `(B, H, M, R)`.
        causal: a query sees no later keys; queries are the last `N` of `M`.
        scale: `τ`, factor on `q k^T` alone, default `D ** -0.5`.
        mask: further restriction.

    Returns:
        `(B, H, N, Dv)`.

    Raises:
        ValueError: factors of different rank, or that do not fit `q` and `k`.
    """
    if causal:
        mask = Causal() if mask is None else Causal() & mask
    if q_bias.dim() >= 2 and q_bias.shape[-2] != q.shape[2]:
        raise ValueError(
            f"factored_bias_attention: q_bias has shape {tuple(q_bias.shape)}, expected "
            f"{q.shape[2]} rows as q has"
        )
    out: Tensor = attend(q, k, v, mask=mask, bias=LowRankBias(q_bias, k_bias), scale=scale)
    return out
