"""Landmark Attention: a landmark token closes each block and gates the block's tokens.

Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers",
arXiv 2305.16300, section 3.1 (the grouped softmax). For query `i` with the logits `s_ij`, its own
block `b` and the landmark `lm(c)` of block `c`:

    P1 = softmax over  {own tokens j <= i, no landmark}  and  {lm(c) : c earlier than b}
    P2_c = softmax over the regular tokens of block c
    weight of an own token: P1_j      of token j of block c: P1_lm(c) P2_c(j)      of a landmark: 0

The landmark of a query's own block is left out even when the query is that landmark. `P2_c V` is plain
attention inside a block, so the whole is a merge of such parts with `s_i,lm(c)` in the place of their
log-sum-exp: there is no table of groups whose size bounds the input, as in the authors' code.

Further files: `landmark_tokens` (inserting landmarks, training targets, position jumps),
`landmark_cache` (inference that reads a few blocks), `landmark_layer` (the module). A model must be
trained with landmarks; a plain one has none.

Checked against epfml/landmark-attention, `lm_benchmark/models/landmark.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.data_masks import Documents, Keys
from regard.core.layout import pack_lists
from regard.core.masks import Causal, Mask
from regard.core.merge import merge

CARD = Card(
    key="landmark",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    arxiv="2305.16300",
    family="sparse",
    entry="regard.sparse.landmark:landmark_attention",
    definition="tests/sparse/test_landmark.py::test_is_the_grouped_softmax",
    oracle="python -m tests.golden tests/golden/data/landmark.npz",
    claim="python -m benchmarks.landmark --train --only recall",
    cost="python -m benchmarks.landmark --only growth",
    note="Needs training with landmark tokens; the claim is shown on a small recall task.",
)

# Keys of earlier blocks that one attention call takes on.
_KEYS = 512


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """The grouped softmax over all earlier blocks (training, or a cache read in full). Causal.

    Args:
        q: `(B, H, N, D)`, the last `N` of `M` positions.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`, landmarks among them.
        is_landmark: bool `(M,)` or `(B, M)`. Blocks may have any lengths, also none: the weight of
            the landmark of a block without tokens is lost, as the formula says.
        scale: factor on the scores, default `D ** -0.5`.
        return_lse: also return `(B, H, N)`, the log-sum-exp of the logits in `P1`.

    Returns:
        `(B, H, N, Dv)` in the dtype of `q`. A row without a token (a first token that is a landmark)
        is 0, its log-sum-exp `-inf`.

    Raises:
        ValueError: `is_landmark` does not fit the keys, or more queries than keys.
    """
    batch, m = q.shape[0], k.shape[2]
    offset = m - q.shape[2]
    if is_landmark.dtype != torch.bool or is_landmark.shape not in ((m,), (batch, m)):
        raise ValueError(
            f"landmark_attention: is_landmark is {is_landmark.dtype} {tuple(is_landmark.shape)}, "
            f"expected bool ({m},) or ({batch}, {m})"
        )
    if offset < 0:
        raise ValueError(
            f"landmark_attention: needs as many keys as queries, got {q.shape[2]} queries and {m} keys"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    own: Mask = Causal()
    if batch:  # a mask cannot be made for no batch entry
        block = is_landmark.long().cumsum(-1) - is_landmark.long()
        own = own & Documents(block) & Keys(~is_landmark)
    out, lse = attend(q, k, v, mask=own, scale=scale, return_lse=True)
    dtype, out = out.dtype, out.to(lse.dtype)
    table, places = _blocks(is_landmark.expand(batch, m))
    step = max(1, _KEYS // max(1, table.shape[2]))
    for first in range(0, places.shape[1], step):
        at, tokens = places[:, first : first + step], table[:, first : first + step]
        # No query before the first of these landmarks sees any of the blocks.
        row = max(0, int(at[:, 0].where(at[:, 0] >= 0, m).min()) + 1 - offset)
        if row >= q.shape[2]:
            break
        late = _earlier(q[:, :, row:], k, v, at, tokens, offset + row, scale)
        joined, level = merge([(out[:, :, row:], lse[:, :, row:]), *late])
        out = torch.cat([out[:, :, :row], joined], 2)
        lse = torch.cat([lse[:, :, :row], level], 2)
    out = out.to(dtype)
    return (out, lse) if return_lse else out


def _blocks(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Regular tokens `(B, blocks, L)` and landmarks `(B, blocks)` of the closed blocks, -1 where
    there is none."""
    batch = marked.shape[0]
    block = marked.long().cumsum(-1) - marked.long()
    entry, place = marked.nonzero().unbind(-1)
    places, count = pack_lists(entry, place, batch)
    closed = block < marked.sum(-1, keepdim=True)
    entry, token = (closed & ~marked).nonzero().unbind(-1)
    table, length = pack_lists(entry * count + block[entry, token], token, batch * count)
    return table.view(batch, count, length), places


def _earlier(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, tokens: Tensor, offset: int, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """One part for each of some blocks: attention inside it, and its landmark's logit.

    Args:
        q: the rows from position `offset` on.
        at: `(B, C)`, where the blocks' landmarks stand.
        tokens: `(B, C, L)`, where their tokens stand.
    """
    batch, heads, n, d = q.shape
    count, length = tokens.shape[1:]
    marks = _take(k, at)
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    logits = (grouped @ marks.mT).unflatten(2, (-1, n)).flatten(1, 2) * scale
    row = torch.arange(offset, offset + n, device=q.device)[:, None]
    later = (at >= 0)[:, None, None] & (at[:, None, None] < row)
    logits = logits.masked_fill(~later, -torch.inf).to(_wide(q))
    # Each block becomes a batch entry of its own.
    kb, vb = (
        _take(x, tokens.flatten(1)).unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1)
        for x in (k, v)
    )
    qb = q[:, None].expand(batch, count, heads, n, d).flatten(0, 1)
    real = (tokens >= 0).flatten(0, 1)
    mask = None if bool(real.all()) else Keys(real)
    out = attend(qb, kb, vb, mask=mask, scale=scale).unflatten(0, (batch, count))
    return list(zip(out.unbind(1), logits.unbind(-1), strict=True))


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows `places` `(B, P)` of `x` `(B, Hkv, M, D)`; any row where a place is -1."""
    index = places.clamp(min=0)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
