"""S2-Attention: every head keeps a local window and its own shard of the key blocks.

"Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
arXiv 2407.17678 (Sparsely-Sharded Attention), as the authors' library dkernel defines it. With
blocks of `c` tokens, query block `a`, key block `b` and key head `h`:

    keep(h, a, b) = b <= a and (a - b < w  or  h >= Hk - E  or  (b + h step + o) mod v == 0)
    step = max(1, int(v / H))

The heads together see the whole context while the cache of each shrinks for good. Query heads that
share a key head share its pattern. The pattern is anchored at position 0, so left padding moves it,
and block 0 is a sink only for heads with `(h step + o) mod v == 0`.

The authors' code is followed where it is odd: the step comes from the query heads but the shards
from the key heads. A key head has one residue of the `v`, so with `Hk < v` and no dense head part of
the context is seen by no head: half of it with `H = 4, Hk = 2, v = 4`. :func:`s2_mask` warns of that.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.layout import BlockLayout
from regard.core.masks import Causal
from regard.patterns.s2_pattern import S2 as S2

CARD = Card(
    key="s2",
    title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    arxiv="2407.17678",
    family="kernel",
    entry="regard.patterns.s2:s2_attention",
    definition="tests/patterns/test_s2.py::test_is_the_definition",
    oracle="python -m tests.golden tests/golden/data/s2.npz",
    claim="python -m benchmarks.s2",
    cost="python -m benchmarks.s2 --only growth",
    note="Still quadratic, with the constant 1/v; the step is the authors', from query heads.",
)


def s2_mask(
    heads: int,
    block: int = 64,
    local_blocks: int | tuple[int, int] = 16,
    vert_stride: int = 8,
    kv_heads: int | None = None,
    dense_heads: int = 0,
    offset: int = 0,
    homo: bool = False,
    *,
    causal: bool = True,
    vert_positions: Literal["absolute", "relative"] | None = None,
    step: int | None = None,
) -> S2:
    """S2's mask, with a warning when the heads together do not cover the context.

    Args:
        heads: `H`, query heads.
        block: `c`, tokens a block.
        local_blocks: `w`, local blocks, the current one included; `(left, right)` without causality.
        vert_stride: `v`, every `v`-th block beyond the window belongs to a head's shard.
        kv_heads: `Hk`, key heads, by default as many as query heads.
        dense_heads: `E`, how many of the last key heads see everything.
        offset: `o`, which block the first head's shard starts with.
        homo: one pattern for all heads (then `dense_heads` must be 0).
        causal: whether queries see only keys before them.
        vert_positions: whether the stride counts blocks from position 0 (`"absolute"`, the default
            with causality) or from the edge of the window (`"relative"`, the default without;
            then all heads have one pattern and a cache saves nothing).
        step: by how many blocks the shards of neighbouring heads differ, by default the authors'.

    Defaults are those of Phi-3-small, which also has a dense layer every 2 layers.

    Raises:
        ValueError: sizes out of range, `kv_heads` does not divide `heads`, or `homo` with dense heads.
    """
    mask = S2(
        heads,
        block,
        local_blocks,
        vert_stride,
        kv_heads,
        dense_heads,
        offset,
        homo,
        causal,
        vert_positions,
        step,
    )
    missing = mask.missing
    if missing:
        warnings.warn(
            f"s2_mask: key blocks of {len(missing)} of {mask.vert_stride} residues are in no head's "
            f"shard and seen by nobody beyond the window, with {mask.shards} key heads and step "
            f"{mask.step}; vert_stride <= {mask.shards} and step=1 cover the whole context",
            stacklevel=2,
        )
    return mask


def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    local_blocks: int | tuple[int, int] = 16,
    vert_stride: int = 8,
    dense_heads: int = 0,
    offset: int = 0,
    homo: bool = False,
    causal: bool = True,
    vert_positions: Literal["absolute", "relative"] | None = None,
    step: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention under S2's mask, for a prompt or for the last rows over a cache.

    Args:
        q: `(B, H, N, D)`, the last `N` of `M` positions.
        k, v: `(B, Hk, M, D)` and `(B, Hk, M, Dv)`; their heads are the `Hk` of the pattern.
        block, local_blocks, vert_stride, dense_heads, offset, homo, causal, vert_positions, step: as
            :func:`s2_mask`.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"s2_attention: q and k must be (batch, heads, length, width), got {tuple(q.shape)} "
            f"and {tuple(k.shape)}"
        )
    mask = s2_mask(
        q.shape[1],
        block,
        local_blocks,
        vert_stride,
        k.shape[1],
        dense_heads,
        offset,
        homo,
        causal=causal,
        vert_positions=vert_positions,
        step=step,
    )
    layout = s2_layout(mask, q.shape[2], k.shape[2], device=q.device)
    out: Tensor
    if layout is None:
        out = attend(q, k, v, mask=mask, scale=scale)
    else:
        out = attend(q, k, v, layout=layout, scale=scale)
    return out


def s2_layout(
    mask: S2, n: int, m: int, *, device: torch.device | str | None = None
) -> BlockLayout | None:
    """The pattern as lists of key blocks for each key head, which grouped query heads share.

    It holds when every block of the layout lies in one block of the pattern; there only causality
    needs a mask. Its sides are the largest powers of two that allow it, up to 128 and 64.

    Returns:
        A layout of `Hk` heads (1 if all heads share a pattern), `None` where blocks would be
        smaller than 16 although there are 16 queries, or where nothing is to be computed.
    """
    mask.check(n, m)
    side_k = math.gcd(mask.block, 64)
    side_q = math.gcd(mask.block, 128, m - n) if n > 1 else 1
    if min(side_k, side_q if n > 1 else 16) < min(16, n) or not n or not m:
        return None
    return _layout(mask, n, m, side_q, side_k, torch.device(device or "cpu"))


@lru_cache(maxsize=64)
def _layout(
    mask: S2, n: int, m: int, side_q: int, side_k: int, device: torch.device
) -> BlockLayout:
    h = torch.arange(1 if mask.heads is None else mask.shards, device=device)[:, None, None]
    a = torch.arange(0, n, side_q, device=device)[:, None] + m - n
    b = torch.arange(0, m, side_k, device=device)
    keep = mask.keeps(a // mask.block, b // mask.block, h)
    causal = Causal() if mask.causal else None
    if causal is not None:
        keep = keep & (b <= a + side_q - 1)
    index = torch.where(keep, torch.arange(len(b), device=device), -1)
    return BlockLayout.from_index(index[None], n, m, (side_q, side_k), causal)


def s2_kv_keep(mask: S2, h: int, pos: Any, length: int | None = None) -> Tensor:
    """Which cached keys a key head still needs: the others may be dropped for good.

    Args:
        mask: a pattern with `causal` and absolute positions.
        h: key head.
        pos: positions of keys, int or integer tensor.
        length: number of tokens so far; keys in the local window of the next token, which is at
            position `length`, are kept. Without it: keys that have left the window.

    Returns:
        Bool, the shape of `pos`.

    Raises:
        ValueError: the pattern may come back to a dropped block, or there is no such head.
    """
    if not mask.causal or mask.vert_positions != "absolute":
        raise ValueError(
            "s2_kv_keep: only a causal pattern with absolute positions never reads a dropped block "
            "again, got " + repr(mask)
        )
    if not 0 <= h < mask.shards:
        raise ValueError(f"s2_kv_keep: h must lie in 0..{mask.shards - 1}, got {h}")
    b = torch.as_tensor(pos) // mask.block
    keep = mask.sharded(b, 0 if mask.homo else h)
    if length is not None:
        keep = keep | (length // mask.block - b < mask.left)
    return keep


def is_kv_efficient(block_mask: Tensor) -> bool:
    """Whether a block that a query block does not read is never read by a later one.

    Args:
        block_mask: bool `(..., A, B)`, query blocks by key blocks of one size; only blocks at and
            below the diagonal count.

    Raises:
        ValueError: it is not a bool tensor of two dimensions at least.
    """
    if block_mask.dtype != torch.bool or block_mask.dim() < 2:
        raise ValueError(
            f"is_kv_efficient: block_mask must be a bool tensor (..., A, B), got {block_mask.dtype} "
            f"{tuple(block_mask.shape)}"
        )
    a = torch.arange(block_mask.shape[-2] - 1, device=block_mask.device)[:, None]
    b = torch.arange(block_mask.shape[-1], device=block_mask.device)
    again = block_mask[..., 1:, :] & ~block_mask[..., :-1, :] & (a >= b)
    return not bool(again.any())
