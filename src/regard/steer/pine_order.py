"""PINE's attention on tensors: importance of documents, their order, and merged attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ..core.attend import attend
from ..core.data_masks import Keys
from ..core.masks import Causal, Mask
from ..core.merge import merge

# (x (B, H, L, D), positions (L,) or (B, H, L), or (A, B or 1, 1 or H, L) on A axes) -> x rotated
Rope: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PineLayout:
    """Parts of a sequence: prefix, documents, suffix, in tokens.

    Attributes:
        prefix: tokens before the first document.
        docs: length of each document, at least 1.
        suffix: tokens behind the last one, generated ones included.
    """

    prefix: int
    docs: tuple[int, ...]
    suffix: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "docs", tuple(self.docs))
        if min(self.prefix, self.suffix) < 0 or min(self.docs, default=1) < 1:
            raise ValueError(f"PineLayout: expected lengths >= 0 and documents >= 1, got {self}")

    @property
    def end(self) -> int:
        """Where the documents end."""
        return self.prefix + sum(self.docs)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.end + self.suffix

    @property
    def starts(self) -> tuple[int, ...]:
        """Column at which each document starts, and the end."""
        return tuple(accumulate(self.docs, initial=self.prefix))

    def lifts(self) -> Tensor:
        """How far stacking moves each column, int64 ``(M,)``: each document's end to :attr:`end`."""
        out = torch.zeros(self.length, dtype=torch.int64)
        for start, size in zip(self.starts, self.docs, strict=False):
            out[start : start + size] = self.end - start - size
        return out

    def positions(self) -> Tensor:
        """Stacked positions ``(M,)``: every document ends at :attr:`end`."""
        return torch.arange(self.length) + self.lifts()


def document_shifts(q: Tensor, k: Tensor, layout: PineLayout, scale: float | None = None) -> Tensor:
    """How far each query moves each document away (section 4).

    Importance of a document is the mean weight of its tokens among all documents' keys (without the
    query's own document), without positions; for a query inside a document the sum over that
    document's queries. The most important one is not moved, the second by the first one's length, ...;
    a query's own document counts as the most important one.

    Args:
        q, k: before the rotary embedding, ``(B, H, N, D)``, ``(B, Hkv, M, D)``; rows are the last N.
        layout: its length is M.

    Returns:
        int64 ``(B, H, N, documents)``; zeros in rows of the prefix.
    """
    return _shifts(q, k, layout, scale, None)


def _shifts(
    q: Tensor, k: Tensor, layout: PineLayout, scale: float | None, valid: Tensor | None
) -> Tensor:
    first = k.shape[2] - q.shape[2]
    if not layout.docs:
        return torch.zeros(*q.shape[:3], 0, dtype=torch.int64, device=q.device)
    starts, sizes = layout.starts, torch.tensor(layout.docs, device=q.device)
    parts = []
    for a, z in pairwise(starts):
        # Only the log-sum-exp is of interest: one column of zeros stands for the values.
        none = k.new_zeros(*k.shape[:2], z - a, 1)
        parts.append(
            attend(q, k[:, :, a:z], none, mask=_keys(valid, a, z), scale=scale, return_lse=True)[1]
        )
    mass = torch.stack(parts, -1)
    rows: list[slice | None] = []
    for at, (a, z) in enumerate(pairwise(starts)):
        if a < first:
            rows.append(None)
            continue
        rows.append(slice(a - first, z - first))
        mass[:, :, a - first : z - first, at] = -torch.inf
    score = mass.softmax(-1).nan_to_num(0.0) / sizes
    for at, own in enumerate(rows):
        if own is not None:
            whole = score[:, :, own].sum(2, keepdim=True)
            whole[..., at] = torch.inf
            score[:, :, own] = whole.expand_as(score[:, :, own])
    order = score.argsort(stable=True, dim=-1, descending=True)
    ranked = sizes[order]
    shifts = torch.zeros_like(order).scatter(-1, order, ranked.cumsum(-1) - ranked)
    shifts[:, :, : max(layout.prefix - first, 0)] = 0
    return shifts


def pine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PineLayout,
    rope: Rope,
    *,
    places: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Position-invariant attention.

    Args:
        q: before the rotary embedding, ``(B, H, N, D)``; row ``r`` is column ``r + M - N``. The rows
            hold all documents or none.
        k, v: ``(B, Hkv, M, D)`` before the rotary embedding, ``(B, Hkv, M, Dv)``.
        layout: the parts of the M columns.
        rope: rotates ``x`` to positions ``(L,)``, or ``(B, H, L)`` of every head's own; with
            ``places`` to ``(A, B or 1, 1 or H, L)``.
        places: positions of the columns as they were read, ``(A, B or 1, M)`` on A axes; one column of
            a document takes one position on all of them. Default: the columns, on one axis.
        scale: default ``D ** -0.5``.
        valid: bool ``(M,)`` or ``(B, M)``, False for padding.

    Returns:
        ``(B, H, N, Dv)``. Rows of the prefix and, in order, of a single document are causal attention.

    Raises:
        ValueError: another number of keys than the layout's, or rows that cut the documents.
    """
    n, m = q.shape[2], k.shape[2]
    first, end = m - n, layout.end
    if m != layout.length or n > m:
        raise ValueError(
            f"pine_attention: {n} queries over {m} keys, the layout has {layout.length}"
        )
    if layout.prefix < first < end:
        raise ValueError(
            f"pine_attention: the rows start at column {first}, inside the documents "
            f"({layout.prefix} to {end})"
        )
    if places is None:
        positions = layout.positions().to(q.device)
    else:
        positions = (places + layout.lifts().to(places.device))[:, :, None]
    keys, plain = rope(k, positions), rope(q, positions[..., first:])

    def part(rows: slice, a: int, z: int, x: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Attention of some rows over one part of the keys, spread over all rows."""
        mask = _keys(valid, a, z)
        if causal:
            mask = Causal() if mask is None else Causal() & mask
        # No key that a row must not see lies in the part, so that its columns need no others.
        out, lse = attend(
            x[:, :, rows], keys[:, :, a:z], v[:, :, a:z], mask=mask, scale=scale, return_lse=True
        )
        whole = out.new_zeros(*out.shape[:2], n, out.shape[-1])
        none = lse.new_full((*lse.shape[:2], n), -torch.inf)
        whole[:, :, rows], none[:, :, rows] = out, lse
        return whole, none

    parts: list[tuple[Tensor, Tensor]] = []
    head = max(layout.prefix - first, 0)
    if layout.prefix and head:
        parts.append(part(slice(0, head), 0, layout.prefix, plain, True))
    if layout.prefix and head < n:
        parts.append(part(slice(head, n), 0, layout.prefix, plain, False))
    if layout.suffix:
        parts.append(part(slice(max(end - first, 0), n), end, m, plain, True))
    shifts = _shifts(q, k, layout, scale, valid)
    for at, (a, z) in enumerate(pairwise(layout.starts)):
        x = rope(q, positions[..., first:] + shifts[..., at])
        own = slice(a - first, z - first)
        if first <= layout.prefix:
            parts.append(part(own, a, z, x, True))
        for rows in (slice(head, max(own.start, 0)), slice(max(own.stop, 0), n)):
            if rows.stop > rows.start:
                parts.append(part(rows, a, z, x, False))
        parts = [merge(parts)]
    return merge(parts)[0].to(q.dtype)


def _keys(valid: Tensor | None, a: int, z: int) -> Mask | None:
    return None if valid is None else Keys(valid[..., a:z])
