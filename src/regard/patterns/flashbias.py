"""FlashBias: attention with an additive bias of low rank, at the cost of plain attention.

Liu et al., "FlashBias: Fast Computation of Attention with Bias", arXiv 2505.12044. A bias
`b = Φ_q Φ_k^T` of rank `R` is `R` more channels of the queries and keys (eq. 4):

    softmax(τ q k^T + Φ_q Φ_k^T) v = softmax([τ q | Φ_q] [k | Φ_k]^T) v

so the `N x M` bias is never stored. `τ` multiplies `q k^T` alone. The factors come from a formula
(ALiBi, squared distances), from a singular value decomposition, or from small networks.

The authors' code has `+m (i - j)` in its ALiBi module, the opposite sign of the ALiBi paper
(arXiv 2108.12409); here it is the decaying `m (j - i)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.card import Card
from regard.core.attend import attend
from regard.core.bias import ALiBi, LowRankBias
from regard.core.masks import Causal, Mask

CARD = Card(
    key="flashbias",
    title="FlashBias: Fast Computation of Attention with Bias",
    arxiv="2505.12044",
    family="kernel",
    entry="regard.patterns.flashbias:factored_bias_attention",
    definition="tests/patterns/test_flashbias.py::test_equals_attention_with_the_dense_bias",
    oracle="python -m tests.golden tests/golden/data/flashbias.npz",
    claim="python -m benchmarks.flashbias",
    cost="python -m benchmarks.flashbias",
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


def alibi_factors(
    n_q: int,
    n_k: int,
    heads: int,
    offset: int | None = None,
    *,
    slopes: Tensor | None = None,
    origin: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact factors of ALiBi, `m_h (j - i)`, with `R = 2` (section 3.2).

    Args:
        n_q, n_k: numbers of queries and keys.
        heads: `H`.
        offset: position of the first query, default `n_k - n_q`.
        slopes: `(H,)`, default those of :meth:`regard.ALiBi.for_heads`.
        origin: position that counts as 0 in the factors. `j - i` does not depend on it, but in half
            precision large numbers do: default the middle of the keys. The paper writes 0.

    Returns:
        `Φ_q = m_h [1, i]` `(1, H, n_q, 2)` and `Φ_k = [j, -1]` `(1, H, n_k, 2)`, float32.
    """
    offset = n_k - n_q if offset is None else offset
    origin = n_k // 2 if origin is None else origin
    slopes = ALiBi.for_heads(heads, device=device).slopes if slopes is None else slopes
    if slopes.shape != (heads,):
        raise ValueError(
            f"alibi_factors: slopes has shape {tuple(slopes.shape)}, expected ({heads},)"
        )
    i = torch.arange(offset - origin, offset - origin + n_q, device=device).float()
    j = torch.arange(-origin, n_k - origin, device=device).float()
    phi_q = slopes[:, None, None] * torch.stack([torch.ones_like(i), i], -1)
    phi_k = torch.stack([j, -torch.ones_like(j)], -1)
    return phi_q[None], phi_k.expand(1, heads, n_k, 2)


def sqdist_factors(
    xq: Tensor, xk: Tensor, weight: Tensor | float = 1.0, *, center: bool = True
) -> tuple[Tensor, Tensor]:
    """Exact factors of `-w_i |x_i - x_j|^2` (section 3.2): `R = d + 2`, 5 for points in space.

    Args:
        xq: `(..., N, d)` coordinates of the queries.
        xk: `(..., M, d)` coordinates of the keys.
        weight: `w_i`, a number or `(..., N, 1)`; it broadcasts against `xq`.
        center: subtract the keys' mean from both, which changes no distance. Without it,
            `|x_i|^2` and `|x_j|^2` cancel badly for points far from the origin. The paper does not.

    Returns:
        `Φ_q = w_i [2 x, -|x_i|^2, 1]` `(..., N, d + 2)` and `Φ_k = [x, 1, -|x_j|^2]`
        `(..., M, d + 2)`.
    """
    if xq.shape[-1] != xk.shape[-1]:
        raise ValueError(
            f"sqdist_factors: xq has {xq.shape[-1]} coordinates, xk {xk.shape[-1]}, expected one"
        )
    if center:
        middle = xk.mean(-2, keepdim=True)
        xq, xk = xq - middle, xk - middle
    phi_q = torch.cat(
        [2 * xq, -xq.square().sum(-1, keepdim=True), torch.ones_like(xq[..., :1])], -1
    )
    phi_k = torch.cat([xk, torch.ones_like(xk[..., :1]), -xk.square().sum(-1, keepdim=True)], -1)
    return weight * phi_q, phi_k


def svd_factors(
    bias: Tensor, energy: float | None = None, *, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best factors of a given bias, `b ≈ U_R S_R^1/2 (V_R S_R^1/2)^T` (section 3.2).

    The error is one of the scores: check the attention's output too.

    Args:
        bias: `(..., N, M)`, decomposed in float32 or float64.
        energy: keep the smallest rank at which every matrix has this share of `Σ S^2`;
            default 0.995, the authors' choice for SwinV2-B.
        rank: or keep this rank.

    Returns:
        `Φ_q` `(..., N, R)` and `Φ_k` `(..., M, R)` in the dtype of the decomposition.

    Raises:
        ValueError: both given, or a rank beyond `min(N, M)`.
    """
    if energy is not None and rank is not None:
        raise ValueError("svd_factors: give energy or rank, not both")
    energy = 0.995 if energy is None else energy
    if not 0 < energy <= 1:
        raise ValueError(f"svd_factors: energy must lie in (0, 1], got {energy}")
    work = bias if bias.dtype == torch.float64 else bias.float()
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    if rank is None:
        share = s.square().cumsum(-1)
        enough = share >= energy * share[..., -1:]
        # The last entry holds all the energy, whatever the rounding.
        enough[..., -1] = True
        rank = int(enough.int().argmax(-1).max()) + 1
    if not 1 <= rank <= s.shape[-1]:
        raise ValueError(f"svd_factors: rank must lie in 1..{s.shape[-1]}, got {rank}")
    root = s[..., None, :rank].sqrt()
    return u[..., :rank] * root, vh[..., :rank, :].transpose(-1, -2) * root


class NeuralBiasFactors(nn.Module):
    """Factors computed from token features by two small networks (section 3.2, eq. 6).

    Each is Linear, tanh, Linear, tanh, Linear without biases, as for AlphaFold 3 in the authors'
    code (`R = 96`).

    Args:
        features_q, features_k: widths of the features of queries and keys.
        heads, rank: `H` and `R`.
        hidden: width of the hidden layers.
    """

    def __init__(
        self, features_q: int, features_k: int, heads: int, rank: int, hidden: int = 256
    ) -> None:
        super().__init__()
        sizes = {"heads": heads, "rank": rank, "hidden": hidden}
        sizes |= {"features_q": features_q, "features_k": features_k}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"NeuralBiasFactors: {name} must be >= 1, got {size}")
        self.heads, self.rank = heads, rank
        self.q = self._network(features_q, hidden, heads * rank)
        self.k = self._network(features_k, hidden, heads * rank)

    @staticmethod
    def _network(features: int, hidden: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(features, hidden, bias=False),
            nn.Tanh(),
            nn.Linear(hidden, hidden, bias=False),
            nn.Tanh(),
            nn.Linear(hidden, out, bias=False),
        )

    def forward(self, zq: Tensor, zk: Tensor) -> tuple[Tensor, Tensor]:
        """Factors `(B, H, N, R)` and `(B, H, M, R)` of features `(B, N, Fq)` and `(B, M, Fk)`."""
        phi_q, phi_k = (
            net(z).unflatten(-1, (self.heads, self.rank)).transpose(1, 2)
            for net, z in ((self.q, zq), (self.k, zk))
        )
        return phi_q, phi_k

    def loss(self, zq: Tensor, zk: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error of the factored bias against `bias` `(B, H, N, M)` (eq. 6)."""
        phi_q, phi_k = self(zq, zk)
        return (phi_q @ phi_k.transpose(-1, -2) - bias).square().mean()
