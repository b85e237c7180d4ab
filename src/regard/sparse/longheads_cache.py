"""LongHeads' state while a sequence grows, and its layer (arXiv 2402.10685)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from regard.core.rope import rope

from .longheads_chunks import ChunkSelect, Rotate, attend_chunks, chunk_features

__all__ = ["ChunkCache", "ChunkFeatures", "LongHeadsAttention", "longheads_attention"]


class ChunkFeatures:
    """Features of the complete chunks of a growing sequence; one is added when a chunk fills up.

    Args:
        window: tokens a chunk.
        scale: factor on the scores, default `D ** -0.5`.

    Attributes:
        length: tokens seen.
        features: `(B, H, length // window, D)`, `None` before the first tokens.
    """

    def __init__(self, window: int, scale: float | None = None) -> None:
        self.window, self.scale = window, scale
        self.length = 0
        self.features: Tensor | None = None
        self._running: tuple[Tensor, ...] | None = None

    def update(self, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Tensor:
        """Take in the next tokens, unrotated `(B, H or Hkv, T, D)`; all features so far."""
        parts: tuple[Tensor, ...] = (q, k, v)
        if self._running is not None:
            parts = tuple(
                torch.cat([old, new], 2) for old, new in zip(self._running, parts, strict=True)
            )
        whole = parts[0].shape[2] // self.window
        end = whole * self.window
        place = torch.arange(end, device=q.device) % self.window
        filled = [x[:, :, :end] for x in parts]
        filled[:2] = [rotate(x, place) for x in filled[:2]]
        cut = [x.unflatten(2, (whole, self.window)) for x in filled]
        if whole:
            new = chunk_features(cut[0], cut[1], cut[2], scale=self.scale)
        else:
            new = q.new_zeros(*q.shape[:2], 0, q.shape[3])
        self.features = new if self.features is None else torch.cat([self.features, new], 2)
        self._running = tuple(x[:, :, end:] for x in parts)
        self.length += q.shape[2]
        return self.features


class ChunkCache:
    """Keys, values and chunk features of one layer and one sequence.

    Args:
        select: the sizes.
        base: of the rotary embedding.
        scale: factor on the scores, default `D ** -0.5`.
    """

    def __init__(
        self, select: ChunkSelect, *, base: float = 10000.0, scale: float | None = None
    ) -> None:
        self.select, self.base, self.scale = select, base, scale
        self.chunks = ChunkFeatures(select.window, scale)
        self._kv: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.chunks.length

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, exclude_self: bool = False) -> Tensor:
        """Attention `(B, H, T, Dv)` of the next tokens, which are then kept.

        Args:
            q, k, v: `(B, H, T, D)`, `(B, Hkv, T, D)`, `(B, Hkv, T, Dv)`, before the rotary embedding.
            exclude_self: as in :func:`~regard.sparse.longheads_chunks.attend_chunks`.
        """
        rotate = partial(rope, base=self.base)
        at = torch.arange(self.length, self.length + q.shape[2], device=q.device)
        features = self.chunks.update(q, k, v, rotate)
        keys, values = rotate(k, at), v
        if self._kv is not None:
            keys, values = torch.cat([self._kv[0], keys], 2), torch.cat([self._kv[1], v], 2)
        self._kv = keys, values
        return attend_chunks(
            q,
            keys,
            values,
            features,
            self.select,
            rotate,
            exclude_self=exclude_self,
            scale=self.scale,
        )


def longheads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: ChunkSelect | None = None,
    *,
    base: float = 10000.0,
    exclude_self: bool = False,
    scale: float | None = None,
) -> Tensor:
    """LongHeads over a whole sequence. Causal.

    Args:
        q, k, v: `(B, H, N, D)`, `(B, Hkv, N, D)`, `(B, Hkv, N, Dv)`, before the rotary embedding.
        select: sizes, default `ChunkSelect()`.
        base: of the rotary embedding.
        exclude_self: as in the authors' prefill, queries from `start` on do not see themselves.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`.

    Raises:
        ValueError: as many keys as queries are needed; a cache is :class:`ChunkCache`.
    """
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"longheads_attention: expected as many keys as queries, got {k.shape[2]} and "
            f"{q.shape[2]}; ChunkCache decodes"
        )
    cache = ChunkCache(ChunkSelect() if select is None else select, base=base, scale=scale)
    return cache.attend(q, k, v, exclude_self=exclude_self)


class LongHeadsAttention(nn.Module):
    """A causal self-attention layer (Llama's) with LongHeads' selection beyond `select.start`.

    Args:
        dim: channels `C`.
        heads, kv_heads: query heads and key heads (default as many).
        select: sizes, default `ChunkSelect()`.
        base: of the rotary embedding.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: linear maps without bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        select: ChunkSelect | None = None,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or dim % heads or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"LongHeadsAttention: heads must divide dim and kv_heads heads, got dim {dim}, "
                f"heads {heads} and kv_heads {kv_heads}"
            )
        self.head_dim = dim // heads
        self.select, self.base = ChunkSelect() if select is None else select, base
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def new_cache(self) -> ChunkCache:
        """An empty cache for this layer."""
        return ChunkCache(self.select, base=self.base)

    def forward(
        self, x: Tensor, cache: ChunkCache | None = None, *, exclude_self: bool = False
    ) -> Tensor:
        """`(B, N, C)` for the tokens `x` `(B, N, C)`, which follow those in the cache."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        cache = self.new_cache() if cache is None else cache
        out = cache.attend(q, k, v, exclude_self=exclude_self)
        joined: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return joined
