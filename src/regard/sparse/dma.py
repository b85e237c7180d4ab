"""Dynamic mask attention: keys are scored from their values, and each row reads the best of its past.

Shi et al., "Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124. A key's score does not depend
on the query: with the values of all key heads concatenated, `v` `(B, M, Hkv Dv)`,

    delta = exp(A softplus(W v + b))                 (B, Hkv, M)
    out = softmax(q k^T / sqrt(D) + m) v,   m_ij = delta_j  if j is among the w best of 0..i, else -inf

so that the score both chooses the keys and is added to their logits (with a positive sign: what is
kept is favoured, not merely let through). The choice has no gradient; `A`, `W`, `b` learn through the
logits. A row's own token may be dropped; ties, as at the start where `A` is 0, go to the recent keys.
Scores cost O(M Hkv^2 Dv), the choice O(M log M), attention O(N w D); the KV cache is not reduced.

Followed: `DogeAttention` of transformers (queries and keys RMS-normed before the rotary embedding).
The authors' newer kernels drop the `exp` (`score="linear"` here) and may smooth the mask to the majority
of a block, which is not included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.card import Card
from regard.core.attend import attend
from regard.core.layout import BlockLayout
from regard.core.masks import Causal, Full, Mask

from .dma_cache import DynamicMaskCache as DynamicMaskCache
from .dma_mask import KeptKeys, check_window
from .dma_mask import dynamic_mask as dynamic_mask

CARD = Card(
    key="dma",
    title="Trainable Dynamic Mask Sparse Attention",
    arxiv="2508.02124",
    family="sparse",
    entry="regard.sparse.dma:DynamicMaskAttention",
    definition="tests/sparse/test_dma.py::test_is_the_papers_equations",
    oracle="python -m tests.golden tests/golden/data/dma.npz",
    claim="python -m benchmarks.dma --train",
    cost="python -m benchmarks.dma --only growth",
    note="The newer kernels' smoothing of the mask to majority blocks is not included.",
)

SCORES = ("exp", "linear")


def key_scores(
    v: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, score: str = "exp"
) -> Tensor:
    """`delta`, one score a key and key head (eq. 5): `exp(A softplus(W v + b))`.

    Args:
        v: `(B, Hkv, M, Dv)`.
        weight, bias: `(Hkv, Hkv Dv)` and `(Hkv,)` or None.
        a: `(Hkv,)`.
        score: `"exp"`, or `"linear"` for `A softplus(W v + b)`.

    Returns:
        `(B, Hkv, M)`, in float32 at least: `exp` overflows half precision for moderate `A`.
    """
    if score not in SCORES:
        raise ValueError(f"key_scores: score must be one of {', '.join(SCORES)}, got {score!r}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    together = v.transpose(1, 2).flatten(2).to(dtype)
    step = F.softplus(
        F.linear(together, weight.to(dtype), None if bias is None else bias.to(dtype))
    )
    level = (a.to(dtype) * step).transpose(1, 2)
    return level.exp() if score == "exp" else level


def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    window: int = 2048,
    *,
    mask: Mask | None = None,
    layout: BlockLayout | None = None,
    scale: float | None = None,
    block_q: int = 64,
) -> Tensor:
    """Attention to the `window` best keys of each row, their scores added to the logits (eq. 6-8).

    Args:
        q: `(B, H, N, D)`, the last `N` of `M` positions.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`.
        delta: `(B, Hkv, M)`, larger is better. Gradients reach it through the logits.
        window: `w >= 1`.
        mask: what may be chosen from, `None` means causal; see :func:`dynamic_mask`.
        layout: the choice as key lists, where it was made before (:meth:`DynamicMaskCache.step`).
        scale: factor on `q k^T`, default `D ** -0.5`.
        block_q: rows whose keys are gathered together.

    Returns:
        `(B, H, N, Dv)`. Rows that may see nothing are 0.

    Raises:
        ValueError: `window` below 1, or `delta` is not `(B, Hkv, M)`.
    """
    check_window("dynamic_mask_attention", window)
    (heads, n, d), (hkv, m) = q.shape[1:], k.shape[1:3]
    if delta.shape != k.shape[:3]:
        raise ValueError(
            f"dynamic_mask_attention: delta is {tuple(delta.shape)}, expected {tuple(k.shape[:3])}"
        )
    if hkv == 0 or heads % hkv:
        raise ValueError(
            f"dynamic_mask_attention: k has {hkv} heads, which does not divide q's {heads}"
        )
    dtype = torch.promote_types(q.dtype, delta.dtype)
    # A term that depends on the key alone is one more channel of the keys against a constant one.
    wide_q = F.pad(q.to(dtype) * (d**-0.5 if scale is None else scale), (0, 1), value=1.0)
    wide_k = torch.cat([k.to(dtype), delta[..., None].to(dtype)], -1)
    read: Mask | None = None
    if layout is None and m <= window:
        read = Causal() if mask is None else mask
    elif layout is None:
        read = dynamic_mask(delta, window, mask, n=n, group=heads // hkv)
        if isinstance(read, KeptKeys) and n > 0:
            rows = min(block_q, n)
            few = not read.causal or 2 * (window + rows) < m
            layout, read = read.lists(n, m, rows) if few else read.blocks(n, m, rows), None
    out: Tensor = attend(wide_q, wide_k, v.to(dtype), mask=read, layout=layout, scale=1.0)
    return out.to(q.dtype)


class DynamicMaskAttention(nn.Module):
    """Dynamic mask attention as a layer; parameters are named as transformers' `DogeAttention`'s.

    Args:
        dim: width of the input and the output.
        heads: query heads.
        kv_heads: key heads, default `heads`.
        window: `w`, keys a row.
        score: `"exp"` (the paper's) or `"linear"`.
        qk_norm: RMS-norm of queries and keys, head by head, before the rotary embedding.
        head_dim: default `dim // heads`.
        bias: whether the projections have one.
        eps: of the norms.

    Raises:
        ValueError: sizes that do not fit, a window below 1, an unknown score.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        window: int = 2048,
        score: str = "exp",
        qk_norm: bool = True,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_window("DynamicMaskAttention", window)
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"DynamicMaskAttention: heads must be a multiple of kv_heads, got {heads} and {kv_heads}"
            )
        if head_dim is None and dim % heads:
            raise ValueError(
                f"DynamicMaskAttention: dim must be a multiple of heads, got {dim} and {heads}"
            )
        if score not in SCORES:
            raise ValueError(
                f"DynamicMaskAttention: score must be one of {', '.join(SCORES)}, got {score!r}"
            )
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.heads, self.kv_heads, self.window, self.score = heads, kv_heads, window, score
        width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias)
        self.k_proj = nn.Linear(dim, kv_width, bias)
        self.v_proj = nn.Linear(dim, kv_width, bias)
        self.A = nn.Parameter(torch.zeros(kv_heads))
        self.dt_proj = nn.Linear(kv_width, kv_heads, bias)
        self.o_proj = nn.Linear(width, dim, bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()

    def delta(self, v: Tensor) -> Tensor:
        """Scores `(B, Hkv, M)` of keys with values `v` `(B, Hkv, M, Dv)`."""
        return key_scores(v, self.dt_proj.weight, self.dt_proj.bias, self.A, self.score)

    def project(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, H, N, D)` of `x`, keys and values `(B, Hkv, M, D)` of `context` or `x`."""
        source = x if context is None else context
        q, k, v = (
            projection(y).unflatten(-1, (-1, self.head_dim))
            for projection, y in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        return _rotated(q, cos, sin), _rotated(k, cos, sin), v.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask: Mask | None = None,
        cache: DynamicMaskCache | None = None,
        *,
        context: Tensor | None = None,
    ) -> Tensor:
        """`(B, N, dim)` from `x` `(B, N, dim)`.

        Args:
            cos, sin: of the rotary embedding (halves of a head are pairs), `(1 or B, N, D_head)`;
                `None` for no positions.
            mask: what may be chosen from, by default causal; with a cache it covers all `M` keys.
            cache: keys, values and scores of the tokens before; the new ones are appended.
            context: `(B, M, dim)` for cross-attention: keys and values come from it, and by default
                all of it may be seen.

        Raises:
            ValueError: `context` together with positions or a cache, or one of `cos` and `sin`.
        """
        if (cos is None) != (sin is None):
            raise ValueError("DynamicMaskAttention: cos and sin go together, got one of them")
        if context is not None and (cos is not None or cache is not None):
            raise ValueError("DynamicMaskAttention: context goes with neither cos, sin nor cache")
        q, k, v = self.project(x, cos, sin, context)
        delta = self.delta(v)
        if context is not None and mask is None:
            mask = Full()
        layout: BlockLayout | None = None
        if cache is not None:
            k, v, delta = cache.append(k, v, delta)
            if x.shape[1] == 1:
                layout = cache.step(self.window, mask, self.heads // self.kv_heads)
        out = dynamic_mask_attention(q, k, v, delta, self.window, mask=mask, layout=layout)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return x
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return x * cos + torch.cat([-b, a], -1) * sin
