"""Exact factors of biases that have a formula (FlashBias, arXiv 2505.12044, section 3.2).

Every function returns `Φ_q` `(..., N, R)` and `Φ_k` `(..., M, R)` with `Φ_q Φ_k^T` the bias, from
plain differentiable operations: coordinates and weights may require gradients. Factors of a sum of
biases are joined channels, :func:`join_factors`. The paper's examples are ALiBi and squared
distances; the others follow from the same two lines of algebra.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.bias import ALiBi

Factors = tuple[Tensor, Tensor]


def alibi_factors(
    n_q: int,
    n_k: int,
    heads: int,
    offset: int | None = None,
    *,
    slopes: Tensor | None = None,
    origin: int | None = None,
    device: torch.device | str | None = None,
) -> Factors:
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
) -> Factors:
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


def polynomial_factors(tq: Tensor, tk: Tensor, coefficients: Tensor) -> Factors:
    """Exact factors of `Σ_p c_p (t_j - t_i)^p`, with `R = P + 1` by the binomial theorem.

    `c = [0, m]` is ALiBi, `c = [0, 0, -w]` a squared distance in time. The coordinates should be of
    the order of 1: powers of large ones cancel.

    Args:
        tq: `(..., N)` times or positions of the queries, any spacing.
        tk: `(..., M)` those of the keys.
        coefficients: `(..., P + 1)`, `c_0` first; leading axes, such as `(H, P + 1)`, broadcast
            against those of `tq`.
    """
    terms = coefficients.shape[-1]
    if terms < 1:
        raise ValueError("polynomial_factors: coefficients is empty, expected c_0 at least")
    # (t_j - t_i)^p = Σ_r C(p, r) t_j^r (-t_i)^(p - r): channel r carries t_j^r.
    channels = []
    for r in range(terms):
        parts = [
            math.comb(p, r) * coefficients[..., p, None] * (-tq) ** (p - r) for p in range(r, terms)
        ]
        channels.append(torch.stack(parts).sum(0))
    return torch.stack(channels, -1), torch.stack([tk**r for r in range(terms)], -1)


def cosine_factors(
    xq: Tensor, xk: Tensor, frequencies: Tensor, weight: Tensor | float = 1.0
) -> Factors:
    """Exact factors of `Σ_f w_f cos(ω_f · (x_i - x_j))`, with `R = 2 F`.

    With enough frequencies this is any stationary bias (its Fourier series, or random features).

    Args:
        xq: `(..., N, d)` coordinates of the queries.
        xk: `(..., M, d)` those of the keys.
        frequencies: `(F, d)`, radians per unit.
        weight: `w_f`, a number or `(..., F)`; it broadcasts against `(..., N, F)`.
    """
    if frequencies.dim() != 2 or not frequencies.shape[-1] == xq.shape[-1] == xk.shape[-1]:
        raise ValueError(
            f"cosine_factors: frequencies has shape {tuple(frequencies.shape)}, expected (F, d) "
            f"with d = {xq.shape[-1]} of xq and {xk.shape[-1]} of xk"
        )
    at_q, at_k = xq @ frequencies.T, xk @ frequencies.T
    phi_q = torch.cat([weight * at_q.cos(), weight * at_q.sin()], -1)
    return phi_q, torch.cat([at_k.cos(), at_k.sin()], -1)


def haversine_factors(xq: Tensor, xk: Tensor, weight: Tensor | float = 1.0) -> Factors:
    """Exact factors of `-w_i sin^2(θ_ij / 2)` for points on a sphere, with `R = 4`.

    `θ` is the great-circle distance; `sin^2(θ / 2) = (1 - x_i · x_j) / 2` is a quarter of the squared
    chord. The distance `θ` itself has no exact factors: train a network for it.

    Args:
        xq: `(..., N, 2)` latitudes and longitudes of the queries, in radians.
        xk: `(..., M, 2)` those of the keys.
        weight: `w_i`, a number or `(..., N, 1)`.
    """
    if xq.shape[-1] != 2 or xk.shape[-1] != 2:
        raise ValueError(
            f"haversine_factors: xq has {xq.shape[-1]} coordinates and xk {xk.shape[-1]}, "
            "expected latitude and longitude"
        )
    on_q, on_k = _on_sphere(xq), _on_sphere(xk)
    phi_q = torch.cat([0.5 * on_q, torch.full_like(on_q[..., :1], -0.5)], -1)
    return weight * phi_q, torch.cat([on_k, torch.ones_like(on_k[..., :1])], -1)


def _on_sphere(x: Tensor) -> Tensor:
    lat, lon = x.unbind(-1)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1)


def group_factors(table: Tensor, groups_q: Tensor, groups_k: Tensor) -> Factors:
    """Exact factors of `table[g_i, g_j]`, a term for each pair of kinds of tokens, with `R = G`.

    Args:
        table: `(..., G, G)` float, such as `(H, G, G)`.
        groups_q: `(N,)` int64, kind of each query.
        groups_k: `(M,)` int64, kind of each key.
    """
    kinds = table.shape[-1]
    if table.dim() < 2 or table.shape[-2] != kinds:
        raise ValueError(
            f"group_factors: table has shape {tuple(table.shape)}, expected (..., G, G)"
        )
    for name, groups in (("groups_q", groups_q), ("groups_k", groups_k)):
        if groups.dim() != 1 or (groups.numel() and not 0 <= groups.min() <= groups.max() < kinds):
            raise ValueError(
                f"group_factors: {name} must be a vector of numbers in [0, {kinds}), got shape "
                f"{tuple(groups.shape)}"
            )
    return table[..., groups_q, :], F.one_hot(groups_k, kinds).to(table.dtype)


def join_factors(*factors: Factors) -> Factors:
    """Factors of the sum of several biases: their channels side by side, `R = Σ R`.

    Leading axes broadcast, so a bias of all heads joins one of each head.
    """
    if not factors:
        raise ValueError("join_factors: expected at least one pair of factors")
    return _side_by_side([q for q, _ in factors]), _side_by_side([k for _, k in factors])


def _side_by_side(parts: list[Tensor]) -> Tensor:
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in parts], -1)


def multiply_channels(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor) -> Factors:
    """Queries and keys of scores that are *multiplied* by `Φ_q Φ_k^T`: `R D` channels.

    `(q k^T) ∘ (Φ_q Φ_k^T) = [q ∘ φ_q1 | ... | q ∘ φ_qR] [k ∘ φ_k1 | ... | k ∘ φ_kR]^T`. Pass the
    result to `attend` with the `scale` of the narrow queries, `D ** -0.5`.

    Args:
        q: `(..., N, D)`.
        k: `(..., M, D)`.
        phi_q, phi_k: broadcastable to `(..., N, R)` and `(..., M, R)`.
    """
    if phi_q.shape[-1] != phi_k.shape[-1]:
        raise ValueError(
            f"multiply_channels: phi_q has rank {phi_q.shape[-1]}, phi_k has {phi_k.shape[-1]}, "
            "expected one"
        )
    wide_q, wide_k = (
        (phi.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) for x, phi in ((q, phi_q), (k, phi_k))
    )
    return wide_q, wide_k
