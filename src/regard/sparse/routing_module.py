"""Routing attention as a module: it keeps the centroids and moves them while it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .routing import check_real, routing_attention
from .routing_cache import RoutingCache
from .routing_kmeans import check_form, commitment_loss, ema_step, lloyd_step, route_norm


class RoutingAttention(nn.Module):
    """Attention inside the clusters of learned centroids (arXiv 2003.05997).

    In training mode every forward pass moves the centroids, after they were used. They are buffers:
    gradients move queries and keys towards them, through the loss that comes with the output. Train
    it in float32; in bfloat16 a step of `1 - decay` is lost in rounding.

    The paper gives half of the heads to local windows: make those with :func:`regard.attend` and
    `SlidingWindow`, and this module with the other half.

    Args:
        heads, head_dim: `H` and `D`.
        n_clusters: `C`; `n_clusters * window` near the length of the sequence covers it once.
        window: `w`, tokens of a cluster.
        decay: `λ` of the moving averages.
        commitment: weight `β` of the loss.
        share_qk: keys are the queries; by default as `causal`.
        causal: a query reads no later key.
        form: `"official"` or `"pypi"`, see :mod:`regard.sparse.routing`. They differ in how the
            centroids move, too: counts and sums are averaged (`ema_step`), or the centroids themselves,
            `μ <- λ μ + (1 - λ) lloyd_step(x, μ)`; and in the loss of separate queries and keys, which is
            the sum of both means, or the mean over both.
        scale, self_score, eps: as for :func:`~regard.sparse.routing.routing_attention`.
        init_steps: steps of spherical k-means, from random tokens, at the first forward pass in
            training (the package takes 10); 0 starts with random centroids.

    Raises:
        ValueError: a size out of range or an unknown form.
    """

    means: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        n_clusters: int,
        window: int,
        decay: float = 0.999,
        commitment: float = 1e-4,
        share_qk: bool | None = None,
        *,
        causal: bool = False,
        form: str = "official",
        scale: float | None = None,
        self_score: float | None = None,
        eps: float | None = None,
        init_steps: int = 0,
    ) -> None:
        super().__init__()
        for name, size, least in (
            ("heads", heads, 1),
            ("head_dim", head_dim, 1),
            ("n_clusters", n_clusters, 1),
            ("window", window, 1),
            ("init_steps", init_steps, 0),
        ):
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise ValueError(
                    f"RoutingAttention: {name} must be an integer >= {least}, got {size!r}"
                )
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"RoutingAttention: decay must lie in [0, 1], got {decay}")
        check_form("RoutingAttention", form)
        self.heads, self.head_dim, self.n_clusters, self.window = (
            heads,
            head_dim,
            n_clusters,
            window,
        )
        self.decay, self.commitment, self.form = decay, commitment, form
        self.causal, self.share_qk = causal, causal if share_qk is None else share_qk
        self.scale, self.self_score, self.eps = scale, self_score, eps
        self.init_steps = init_steps
        means = route_norm(torch.randn(heads, n_clusters, head_dim), form)
        self.register_buffer("means", means)
        self.register_buffer("counts", torch.zeros(heads, n_clusters))
        self.register_buffer("sums", means.clone())
        self.register_buffer("started", torch.tensor(init_steps == 0))

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, n_clusters={self.n_clusters}, "
            f"window={self.window}, causal={self.causal}, share_qk={self.share_qk}, form={self.form!r}"
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        pad_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and in training mode move the centroids.

        Args:
            q, k, v, pad_mask, key_mask: as for :func:`~regard.sparse.routing.routing_attention`.

        Returns:
            `out` `(B, H, N, Dv)`, and the loss `β mean (x - sg(μ))^2`, a scalar, both in the dtype of
            `q`.
        """
        if q.dim() == 4 and (q.shape[1], q.shape[3]) != (self.heads, self.head_dim):
            raise ValueError(
                f"RoutingAttention: q is {tuple(q.shape)}, expected {self.heads} heads of "
                f"{self.head_dim}"
            )
        real = [pad_mask]
        tokens = [q]
        if not self.share_qk and k is not None:
            tokens.append(k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1))
            same = key_mask is None and k.shape[2] == q.shape[2]
            real.append(pad_mask if same else key_mask)
        if self.training and not bool(self.started):
            self.start(tokens, real)
        out = routing_attention(
            q,
            k,
            v,
            self.means,
            self.window,
            causal=self.causal,
            share_qk=self.share_qk,
            form=self.form,
            pad_mask=pad_mask,
            key_mask=key_mask,
            scale=self.scale,
            self_score=self.self_score,
            eps=self.eps,
        )
        near = [route_norm(x, self.form) for x in tokens]
        both, all_real = _joined(near, real)
        if self.form == "pypi":
            loss = commitment_loss(both, self.means, all_real)
        else:
            loss = torch.stack(
                [commitment_loss(x, self.means, r) for x, r in zip(near, real, strict=True)]
            ).sum()
        if self.training:
            self._move(both.detach(), all_real)
        return out, (self.commitment * loss).to(q.dtype)

    @torch.no_grad()
    def start(
        self,
        tokens: list[Tensor],
        real: list[Tensor | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put the centroids where the tokens are: random ones, then `init_steps` of k-means.

        Args:
            tokens: queries, and keys where they are not shared, each `(B, H, N, D)`.
            real: which of them are not padding, bool `(B, N)` each, or `None` for all.
            generator: source of the choice.

        Raises:
            ValueError: there is no real token.
        """
        near = [route_norm(x, self.form) for x in tokens]
        both, valid = _joined(near, [None] * len(near) if real is None else real)
        b, _, n, _ = both.shape
        flat = torch.ones(b * n, dtype=torch.bool) if valid is None else valid.flatten().cpu()
        places = flat.nonzero()[:, 0]
        if len(places) == 0:
            raise ValueError("RoutingAttention: no real token to start the centroids from")
        device = "cpu" if generator is None else generator.device
        if len(places) >= self.n_clusters:
            order = torch.randperm(len(places), generator=generator, device=device)
        else:
            size = (self.n_clusters,)
            order = torch.randint(len(places), size, generator=generator, device=device)
        taken = places[order[: self.n_clusters].cpu()].to(both.device)
        means = both.transpose(0, 1).flatten(1, 2)[:, taken]
        for _ in range(self.init_steps):
            means = lloyd_step(both, means, self.form, valid)
        self.means.copy_(means)
        self.sums.copy_(means)
        self.counts.zero_()
        self.started.fill_(True)

    def _move(self, near: Tensor, real: Tensor | None) -> None:
        if self.form == "pypi":
            self.means.lerp_(lloyd_step(near, self.means, "pypi", real), 1 - self.decay)
            return
        moved = ema_step(near, self.means, self.counts, self.sums, self.decay, real)
        for held, new in zip((self.means, self.counts, self.sums), moved, strict=True):
            held.copy_(new)

    def new_cache(self) -> RoutingCache:
        """An empty cache for decoding with the present centroids.

        Raises:
            ValueError: the module is not causal.
        """
        if not self.causal:
            raise ValueError("RoutingAttention: decoding needs causal=True, got False")
        return RoutingCache(
            self.means.clone(),
            self.window,
            share_qk=self.share_qk,
            form=self.form,
            scale=self.scale,
            self_score=self.self_score,
            eps=self.eps,
        )


def _joined(near: list[Tensor], real: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Queries and keys as tokens of one sequence, and which of them are real."""
    if len(near) == 1:
        return near[0], real[0]
    if all(r is None for r in real):
        return torch.cat(near, dim=2), None
    masks = []
    for x, r in zip(near, real, strict=True):
        check_real("pad_mask", r, x.shape[0], x.shape[2])
        ones = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
        masks.append(ones if r is None else r)
    return torch.cat(near, dim=2), torch.cat(masks, dim=1)
