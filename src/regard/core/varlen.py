"""Packed sequences: tokens of different sequences back to back, without padding.

ByteTransformer's point (arXiv 2210.03052): padding is work. `pack` once, run everything token-wise
on the packed tensor, attend within each sequence over its true length, `unpack` once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attend import attend
from .bias import Bias
from .call import compute_dtype
from .masks import Causal, Mask

__all__ = ["Packed", "attend_packed", "pack", "unpack"]

# Sequences of one length go into one call while they are short: a call's fixed cost is worth a copy
# of the tokens. Longer ones are slices, without a copy.
_GROUP_LENGTH = 512


class Packed(NamedTuple):
    """A padded batch without its padding.

    Attributes:
        x: the tokens that count, `(T, ...)`, sequence after sequence.
        cu_seqlens: int64 `(B + 1,)`: sequence `b` is `x[cu_seqlens[b] : cu_seqlens[b + 1]]`.
        rows: int64 `(T,)`: packed row `r` was row `rows[r]` of the flattened `(B * S)` batch.
    """

    x: Tensor
    cu_seqlens: Tensor
    rows: Tensor


def pack(x: Tensor, lengths: Tensor | Sequence[int]) -> Packed:
    """Drop the padding of a batch.

    Args:
        x: `(B, S, ...)`.
        lengths: int `(B,)`, the first `lengths[b]` tokens count; or a bool mask `(B, S)`, any
            tokens count. A sequence may be empty.

    Raises:
        ValueError: lengths of another shape, negative or beyond `S`.
    """
    if x.dim() < 2:
        raise ValueError(f"pack: x has shape {tuple(x.shape)}, expected (B, S, ...)")
    batch, side = x.shape[:2]
    count = torch.as_tensor(lengths, device=x.device)
    if count.dtype == torch.bool:
        if count.shape != (batch, side):
            raise ValueError(
                f"pack: the mask has shape {tuple(count.shape)}, expected ({batch}, {side})"
            )
        keep, count = count, count.sum(1)
    else:
        if count.shape != (batch,) or (count.numel() and count.is_floating_point()):
            raise ValueError(
                f"pack: lengths has shape {tuple(count.shape)} and {count.dtype}, expected "
                f"({batch},) integers or a bool mask ({batch}, {side})"
            )
        if count.numel() and not 0 <= int(count.min()) <= int(count.max()) <= side:
            raise ValueError(f"pack: lengths must lie in 0..{side}, got {count.tolist()}")
        keep = torch.arange(side, device=x.device) < count[:, None]
    index = keep.flatten().nonzero()[:, 0]
    cu_seqlens = torch.nn.functional.pad(count.to(torch.int64).cumsum(0), (1, 0))
    return Packed(x.flatten(0, 1).index_select(0, index), cu_seqlens, index)


def unpack(x: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Put packed rows `(T, ...)` back where `index` says, `(B, S, ...)`; the padding is exactly 0.

    Args:
        x, index: as from :func:`pack`.
        shape: `(B, S)`.
    """
    if len(shape) != 2 or index.shape != x.shape[:1]:
        raise ValueError(
            f"unpack: x has {x.shape[0]} rows, index {tuple(index.shape)} and shape "
            f"{tuple(shape)}; expected one index a row, and (B, S)"
        )
    flat = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    return flat.index_copy(0, index, x).view(shape[0], shape[1], *x.shape[1:])


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each packed sequence, over its true length.

    The layout of flash-attn's `flash_attn_varlen_func`: heads come after tokens.

    Args:
        q: `(Tq, H, D)`.
        k, v: `(Tk, Hkv, D)` and `(Tk, Hkv, Dv)`; `Hkv` divides `H`.
        cu_q: int `(B + 1,)`, cumulative lengths: sequence `b` has the queries
            `cu_q[b] .. cu_q[b + 1] - 1`. Sequences may be empty.
        cu_k: the same for the keys; default `cu_q`.
        causal: aligned at the end of each sequence, as in decoding: with `n` queries and `m` keys,
            query `r` sees the keys up to `r + m - n`.
        mask: a Mask of the positions within each sequence, which count from its first key.
        bias: a Bias that fits every sequence length, such as `ALiBi` or `RelativeBias1D`.
        scale: factor on the scores, default `D ** -0.5`.
        return_lse: also return the log-sum-exp `(Tq, H)`.

    Returns:
        `(Tq, H, Dv)`. Queries without keys give 0, and -inf for the log-sum-exp.

    Raises:
        ValueError: shapes or cumulative lengths that do not fit.
    """
    cu_k = cu_q if cu_k is None else cu_k
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"attend_packed: {name} has shape {tuple(x.shape)}, expected (tokens, heads, width)"
            )
    starts_q, starts_k = _bounds("cu_q", cu_q, q), _bounds("cu_k", cu_k, k)
    if len(starts_q) != len(starts_k):
        raise ValueError(
            f"attend_packed: cu_q has {len(starts_q) - 1} sequences, cu_k {len(starts_k) - 1}"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"attend_packed: v has shape {tuple(v.shape)}, k {tuple(k.shape)}; expected the same "
            "tokens and heads"
        )
    if causal:
        mask = Causal() if mask is None else Causal() & mask
    if mask is not None and mask.batch is not None:
        raise ValueError(
            f"attend_packed: the mask is made for batch={mask.batch}; "
            "expected one for all sequences"
        )

    outs: list[Tensor] = []
    lses: list[Tensor] = []
    order: list[int] = []
    for members in _groups(starts_q, starts_k):
        first = members[0]
        n = starts_q[first + 1] - starts_q[first]
        m = starts_k[first + 1] - starts_k[first]
        order += members
        if m == 0:
            rows = n * len(members)
            # Tied to q, so that the result belongs to the graph even where no sequence has keys.
            outs.append((q[:1, :, :1] * 0).expand(rows, -1, v.shape[2]))
            lses.append(q.new_full((rows, q.shape[1]), float("-inf"), dtype=compute_dtype(q.dtype)))
            continue
        parts = (
            _take(q, starts_q, members, n),
            _take(k, starts_k, members, m),
            _take(v, starts_k, members, m),
        )
        result = attend(*parts, mask=mask, bias=bias, scale=scale, return_lse=return_lse)
        out, lse = result if return_lse else (result, None)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(1, 2).flatten(0, 1))

    out = _ordered(outs, order, starts_q, q.new_zeros(0, q.shape[1], v.shape[2]))
    if not return_lse:
        return out
    none = q.new_zeros(0, q.shape[1], dtype=compute_dtype(q.dtype))
    return out, _ordered(lses, order, starts_q, none)


def _bounds(name: str, cu: Tensor, x: Tensor) -> list[int]:
    bounds: list[int] = cu.tolist() if cu.dim() == 1 and not cu.is_floating_point() else []
    if not bounds or bounds[0] != 0 or bounds[-1] != x.shape[0] or sorted(bounds) != bounds:
        raise ValueError(
            f"attend_packed: {name} is {bounds or tuple(cu.shape)}, expected cumulative lengths "
            f"(B + 1,) that ascend from 0 to the {x.shape[0]} tokens"
        )
    return bounds


def _groups(starts_q: list[int], starts_k: list[int]) -> list[list[int]]:
    """Sequences that go into one call. Those without queries are in none."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for s in range(len(starts_q) - 1):
        n, m = starts_q[s + 1] - starts_q[s], starts_k[s + 1] - starts_k[s]
        if n:
            alone = max(n, m) > _GROUP_LENGTH
            groups[(n, m, s) if alone else (n, m)].append(s)
    return list(groups.values())


def _take(x: Tensor, starts: list[int], members: list[int], length: int) -> Tensor:
    """Sequences of one length as `(len(members), heads, length, width)`."""
    first, last = starts[members[0]], starts[members[-1]] + length
    if last - first == length * len(members):
        rows = x[first:last]
    else:
        at = torch.tensor([starts[s] for s in members], device=x.device)[:, None]
        rows = x.index_select(0, (at + torch.arange(length, device=x.device)).flatten())
    return rows.view(len(members), length, *x.shape[1:]).transpose(1, 2)


def _ordered(parts: list[Tensor], order: list[int], starts: list[int], none: Tensor) -> Tensor:
    """The groups' rows in the order of the sequences."""
    if not parts:
        return none
    rows = torch.cat(parts)
    if order == sorted(order):
        return rows
    # Where each sequence's rows stand in the groups' order.
    found, at = {}, 0
    for s in order:
        found[s] = at
        at += starts[s + 1] - starts[s]
    pick = [torch.arange(found[s], found[s] + starts[s + 1] - starts[s]) for s in sorted(found)]
    return rows.index_select(0, torch.cat(pick).to(rows.device))
