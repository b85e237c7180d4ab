"""The attention layer of a model trained with landmarks (arXiv 2305.16300)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.core.rope import rope

from .landmark import landmark_attention
from .landmark_cache import LandmarkCache

__all__ = ["LandmarkAttention"]


class LandmarkAttention(nn.Module):
    """Self-attention with the grouped softmax, its projections and rotary positions.

    Args:
        dim: channels `C` of input and output.
        heads: query heads; they divide `dim` unless `head_dim` is given.
        kv_heads: key heads, which divide `heads`; default `heads`.
        head_dim: default `dim // heads`.
        base: of the rotary embedding, `None` for none.
        bias: of the projections.

    Attributes:
        qkv: `Linear(dim, (heads + 2 kv_heads) * head_dim)`, rows of q, then k, then v.
        out: `Linear(heads * head_dim, dim)`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        base: float | None = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"LandmarkAttention: {heads} heads do not divide dim {dim}")
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(
                f"LandmarkAttention: {self.kv_heads} key heads do not divide {heads} heads"
            )
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.base = base
        self.qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=bias)

    def new_cache(self, block: int, topk: int, mode: str = "token_head") -> LandmarkCache:
        """An empty :class:`~regard.sparse.landmark_cache.LandmarkCache` for this layer."""
        return LandmarkCache(block, topk, mode, base=self.base)

    def forward(
        self,
        x: Tensor,
        is_landmark: Tensor,
        positions: Tensor | None = None,
        cache: LandmarkCache | None = None,
    ) -> Tensor:
        """Attention over the sequence, or over a cache and the next tokens.

        Args:
            x: `(B, N, C)`.
            is_landmark: bool `(N,)` or `(B, N)`.
            positions: `(N,)` or `(B, N)`, default `0, 1, 2, ...`; for
                :func:`~regard.sparse.landmark_tokens.landmark_positions`. A cache has its own.
            cache: made for this layer and these sequences; `x` are the tokens after those in it.

        Returns:
            `(B, N, C)`.
        """
        split = [self.heads, self.kv_heads, self.kv_heads]
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(split, 1)
        if cache is not None:
            if positions is not None or cache.base != self.base:
                raise ValueError(
                    f"LandmarkAttention: with a cache, positions are its own and its base must be "
                    f"{self.base}, got positions {positions is not None} and base {cache.base}"
                )
            out = cache.attend(q, k, v, is_landmark)
        else:
            if self.base is not None:
                places = (
                    torch.arange(x.shape[1], device=x.device) if positions is None else positions
                )
                places = places if places.dim() == 1 else places[:, None]
                q, k = rope(q, places, self.base), rope(k, places, self.base)
            out = landmark_attention(q, k, v, is_landmark)
        joined: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return joined
