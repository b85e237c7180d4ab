"""Online spherical k-means of the Routing Transformer: norms, assignment, loss, and both updates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import compute_dtype

FORMS = ("official", "pypi")
# Pseudo-counts of the moving averages (the official code's epsilon).
_EPS = 1e-5


def check_form(name: str, form: str) -> None:
    """Raise `ValueError` unless there is such a form."""
    if form not in FORMS:
        raise ValueError(f"{name}: form must be one of {', '.join(FORMS)}, got {form!r}")


def route_norm(x: Tensor, form: str = "official") -> Tensor:
    """What is compared with centroids: `x` `(..., D)` on a sphere, in float32 or float64.

    `"official"`: LayerNorm over `D` without parameters, eps 1e-6. `"pypi"`: unit length.
    """
    check_form("route_norm", form)
    x = x.to(compute_dtype(x.dtype))
    if form == "official":
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return F.normalize(x, dim=-1)


def cluster_scores(x: Tensor, means: Tensor) -> Tensor:
    """Closeness `(B, H, N, C)` of normalised `x` `(B, H, N, D)` to centroids `(H, C, D)`."""
    return x @ means.to(x.dtype).mT


def assign(x: Tensor, means: Tensor) -> Tensor:
    """The closest centroid of each token, int64 `(B, H, N)`; of equals the first."""
    return cluster_scores(x.detach(), means).argmax(-1)


def commitment_loss(x: Tensor, means: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of `(x - sg(mu_a))^2` over the elements of all real tokens, a scalar.

    Args:
        x: normalised tokens `(B, H, N, D)`; they get the gradient, the centroids none.
        means: `(H, C, D)`.
        real: bool `(B, N)`, tokens that are not padding.
    """
    nearest = assign(x, means)
    head = torch.arange(x.shape[1], device=x.device)[:, None]
    gap = (x - means.detach().to(x.dtype)[head, nearest]).square().mean(-1)
    if real is None:
        # Without tokens there is nothing to lose, rather than 0 / 0.
        return gap.mean() if gap.numel() else gap.sum()
    weight = real[:, None].to(gap.dtype).expand_as(gap)
    return (gap * weight).sum() / weight.sum().clamp(min=1)


def _totals(x: Tensor, means: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many tokens each centroid is closest to, `(H, C)`, and their sum `(H, C, D)`."""
    (b, h, n, d), clusters = x.shape, means.shape[1]
    nearest = assign(x, means)
    weight = x.new_ones(b, h, n) if real is None else real[:, None].to(x.dtype).expand(b, h, n)
    weight, nearest = (y.transpose(0, 1).reshape(h, b * n) for y in (weight, nearest))
    rows = x.transpose(0, 1).reshape(h, b * n, d) * weight[..., None]
    count = x.new_zeros(h, clusters).scatter_add_(1, nearest, weight)
    total = x.new_zeros(h, clusters, d)
    return count, total.scatter_add_(1, nearest[..., None].expand_as(rows), rows)


@torch.no_grad()
def lloyd_step(
    x: Tensor, means: Tensor, form: str = "official", real: Tensor | None = None
) -> Tensor:
    """One step of spherical k-means: the mean of each cluster's tokens, put back on the sphere.

    Args:
        x: normalised tokens `(B, H, N, D)`.
        means: `(H, C, D)`. Those without a token stay as they are.
        form: which sphere, as for :func:`route_norm`.
        real: bool `(B, N)`, tokens that are not padding.

    Returns:
        `(H, C, D)` in the dtype of `means`.
    """
    count, total = _totals(x, means, real)
    moved = route_norm(total / count.clamp(min=1)[..., None], form)
    return torch.where((count > 0)[..., None], moved.to(means.dtype), means)


@torch.no_grad()
def ema_step(
    x: Tensor,
    means: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The official update: moving averages of each cluster's count and sum, and their quotient.

    `n <- λ n + (1 - λ) Σ h`, `m <- λ m + (1 - λ) Σ h x`, `μ = m / ñ` with
    `ñ = (n + ε) / (Σ n + C ε) Σ n`, ε = 1e-5. A cluster without a token in this batch keeps its
    centroid: there the official code lets `m / ñ` shrink to 0 once `n` falls below ε, or, where `n`
    is still 0, divides by ε.

    Args:
        x: normalised tokens `(B, H, N, D)`.
        means, counts, sums: `(H, C, D)`, `(H, C)`, `(H, C, D)`. The official code starts with `n = 0`
            and `m = μ`: centroids that attract few tokens begin long, which makes them attract more.
        decay: `λ`.
        real: bool `(B, N)`, tokens that are not padding.

    Returns:
        New `means`, `counts` and `sums`.
    """
    count, total = (y.to(means.dtype) for y in _totals(x, means, real))
    counts = decay * counts + (1 - decay) * count
    sums = decay * sums + (1 - decay) * total
    whole = counts.sum(-1, keepdim=True)
    smooth = (counts + _EPS) / (whole + means.shape[1] * _EPS) * whole
    moved = sums / smooth.where(count > 0, torch.ones_like(smooth))[..., None]
    return torch.where((count > 0)[..., None], moved, means), counts, sums
