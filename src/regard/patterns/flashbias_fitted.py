"""Factors of biases without a formula (FlashBias, arXiv 2505.12044, section 3.2).

A fixed table is decomposed once by its singular values; a bias that changes with the input is
learnt by two small networks of token features. The error of either is one of the scores, and not
that of the attention's output: :func:`rank_curve` gives both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from regard.core.attend import attend
from regard.core.bias import LowRankBias
from regard.core.masks import Mask


def svd_factors(
    bias: Tensor, energy: float | None = None, *, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best factors of a given bias, `b ≈ U_R S_R^1/2 (V_R S_R^1/2)^T` (section 3.2).

    The error is one of the scores: check the attention's output too (:func:`rank_curve`). A constant
    of a row changes no softmax: `bias - bias.mean(-1, keepdim=True)` spends the rank on the rest.

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


@dataclass(frozen=True)
class RankError:
    """What keeping `rank` singular values costs.

    Attributes:
        rank: `R`.
        energy: smallest share of `Σ S^2` that any of the matrices keeps.
        scores: `|b_R - b| / |b|`, Frobenius norms.
        worst_score: `max |b_R - b|`.
        output: `|o_R - o| / |o|` of the attention's output `o`.
    """

    rank: int
    energy: float
    scores: float
    worst_score: float
    output: float


def rank_curve(
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Sequence[int] | None = None,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
) -> list[RankError]:
    """Error against rank, of the scores and of the output, from one decomposition.

    Args:
        bias: `(N, M)`, `(H, N, M)` or `(B, H, N, M)`.
        q, k, v: a sample of what attends under it, as for :func:`regard.attend`.
        ranks: default powers of two and `min(N, M)`.
        scale, mask: as for :func:`regard.attend`.
    """
    full = min(bias.shape[-2:])
    if ranks is None:
        ranks = sorted({*(2**p for p in range(full.bit_length())), full})
    work = bias if bias.dtype == torch.float64 else bias.float()
    phi_q, phi_k = svd_factors(work, rank=full)
    # Both factors carry the root of the singular values.
    energy = phi_q.square().sum(-2).square()
    total = energy.sum(-1)
    exact = attend(q, k, v, bias=work, scale=scale, mask=mask)
    found = []
    for rank in ranks:
        if not 1 <= rank <= full:
            raise ValueError(f"rank_curve: ranks must lie in 1..{full}, got {rank}")
        low_q, low_k = phi_q[..., :rank], phi_k[..., :rank]
        kept = energy[..., :rank].sum(-1)
        left = low_q @ low_k.transpose(-1, -2) - work
        out = attend(q, k, v, bias=LowRankBias(low_q, low_k), scale=scale, mask=mask)
        found.append(
            RankError(
                rank,
                torch.where(total > 0, kept / total, 1.0).min().item(),
                _relative(left, work),
                left.abs().max().item(),
                _relative(out - exact, exact),
            )
        )
    return found


def _relative(error: Tensor, exact: Tensor) -> float:
    """`|error| / |exact|`; where all is zero, there is no error."""
    size = exact.norm().item()
    return error.norm().item() / size if size else 0.0


class NeuralBiasFactors(nn.Module):
    """Factors computed from token features by two small networks (section 3.2, eq. 6).

    Each is Linear, tanh, Linear, tanh, Linear without biases, as for AlphaFold 3 in the authors'
    code (`R = 96`). Without biases the networks are odd functions of the features: give these a
    constant entry unless they have one.

    Args:
        features_q, features_k: widths of the features of queries and keys.
        heads, rank: `H` and `R`.
        hidden: width of the hidden layers.
        generator: source of the initial weights (PyTorch's own by default).
    """

    def __init__(
        self,
        features_q: int,
        features_k: int,
        heads: int,
        rank: int,
        hidden: int = 256,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"heads": heads, "rank": rank, "hidden": hidden}
        sizes |= {"features_q": features_q, "features_k": features_k}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"NeuralBiasFactors: {name} must be >= 1, got {size}")
        self.heads, self.rank = heads, rank
        self.q = _network(features_q, hidden, heads * rank, generator)
        self.k = _network(features_k, hidden, heads * rank, generator)

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


def _network(
    features: int, hidden: int, out: int, generator: torch.Generator | None
) -> nn.Sequential:
    sizes = (features, hidden, hidden, out)
    linear = [
        # skip_init: the weights below are the only ones drawn.
        nn.utils.skip_init(nn.Linear, a, b, bias=False)
        for a, b in pairwise(sizes)
    ]
    for layer in linear:
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    return nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2])


def pair_features(pair: Tensor, single: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a pair tensor for :class:`NeuralBiasFactors`, as the authors' for AlphaFold 3.

    Args:
        pair: `(B, N, M, C)`.
        single: `(B, N, F)`, features of each token (449 in AlphaFold 3); `N = M`.

    Returns:
        `zq`, the mean of each row beside `single`, and `zk`, that of each column,
        `(B, N, C + F)`.
    """
    if pair.dim() != 4 or single.dim() != 3 or pair.shape[:3] != (*single.shape[:2], pair.shape[1]):
        raise ValueError(
            f"pair_features: pair has shape {tuple(pair.shape)} and single {tuple(single.shape)}, "
            "expected (B, N, N, C) and (B, N, F)"
        )
    return torch.cat([pair.mean(2), single], -1), torch.cat([pair.mean(1), single], -1)


def train_factors(
    zq: Tensor,
    zk: Tensor,
    bias: Tensor,
    *,
    rank: int,
    hidden: int = 256,
    steps: int = 1000,
    lr: float = 1e-3,
    samples: int = 8,
    points: int | None = None,
    network: NeuralBiasFactors | None = None,
    generator: torch.Generator | None = None,
) -> tuple[NeuralBiasFactors, Tensor]:
    """Learn networks whose factors give the bias, by Adam with a cosine schedule (eq. 6).

    Several layers of a model have networks of their own: call this for each of them, which is the
    same as the authors' sum of the losses, because no weight is shared and Adam looks at each weight
    alone.

    Args:
        zq: `(S, N, Fq)` features of the queries of `S` examples.
        zk: `(S, M, Fk)` features of the keys.
        bias: `(S, H, N, M)`, what to learn.
        rank, hidden: of new networks.
        steps, lr: number of steps and the first learning rate, which falls to 0.
        samples: examples in a step.
        points: queries and keys of an example that a step looks at, default all of them.
        network: go on with this one instead of a new one.
        generator: source of the first weights and of the order of the examples.

    Returns:
        The networks, and the loss of every step, `(steps,)`.
    """
    if bias.dim() != 4 or zq.dim() != 3 or zk.dim() != 3:
        raise ValueError(
            f"train_factors: got zq {tuple(zq.shape)}, zk {tuple(zk.shape)} and bias "
            f"{tuple(bias.shape)}, expected (S, N, Fq), (S, M, Fk) and (S, H, N, M)"
        )
    count, heads, n, m = bias.shape
    if zq.shape[:2] != (count, n) or zk.shape[:2] != (count, m):
        raise ValueError(
            f"train_factors: bias has {count} examples of {n} x {m}, zq {tuple(zq.shape[:2])}, "
            f"zk {tuple(zk.shape[:2])}"
        )
    for name, value in (("steps", steps), ("samples", samples), ("points", points)):
        if value is not None and value < 1:
            raise ValueError(f"train_factors: {name} must be >= 1, got {value}")
    if network is not None and (network.heads, network.rank) != (heads, rank):
        raise ValueError(
            f"train_factors: the network has {network.heads} heads and rank {network.rank}, "
            f"expected {heads} and {rank}"
        )
    if network is None:
        widths = zq.shape[-1], zk.shape[-1]
        network = NeuralBiasFactors(*widths, heads, rank, hidden, generator=generator)
        network = network.to(bias.device, bias.dtype)
    # The networks see a bias of unit variance, whatever its scale.
    unit = bias.square().mean().sqrt().clamp(min=torch.finfo(bias.dtype).tiny)
    adam = torch.optim.Adam(network.parameters(), lr=lr)
    losses = []

    def pick(length: int, most: int | None) -> Tensor:
        return torch.randperm(length, generator=generator)[:most].to(bias.device)

    with torch.enable_grad():
        for step in range(steps):
            adam.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / steps))
            chosen, rows, cols = pick(count, samples), pick(n, points), pick(m, points)
            target = bias[chosen][:, :, rows][..., cols]
            loss = network.loss(zq[chosen][:, rows], zk[chosen][:, cols], target)
            adam.zero_grad()
            (loss / unit.square()).backward()
            adam.step()
            losses.append(loss.detach())
    return network, torch.stack(losses)
