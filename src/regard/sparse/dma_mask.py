"""The keys that dynamic mask attention keeps: each row's best of what it may see.

Whether key `j` is among the `w` best of the keys `0..i` can change once only: the keys that beat it
become more as `i` grows, never fewer. So a key is kept from its own row up to the row at which the
`w`-th key that beats it arrives. One number a key holds the whole N x M mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.data_masks import Dense, Keys
from regard.core.layout import BlockLayout, Index, pack_lists
from regard.core.masks import And, Causal, Full, Mask
from regard.core.select import choose_blocks


def check_window(name: str, window: int) -> None:
    """Raise ``ValueError`` unless ``window`` is an integer of at least 1."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"{name}: window must be an integer >= 1, got {window!r}")


def kept_until(scores: Tensor, window: int) -> Tensor:
    """The row before which each key is among the ``window`` best of the keys up to that row.

    Args:
        scores: ``(..., M)``. Of equal scores the later one is better; ``-inf`` is never kept.
        window: ``w >= 1``, keys a row.

    Returns:
        int64 ``(..., M)``: key ``j`` is kept by rows ``j <= i < until[j]``. 0 where no row keeps it,
        ``M`` where none of the ``M`` rows drops it. O(M log M) work and O(M) memory a list.
    """
    check_window("kept_until", window)
    m = scores.shape[-1]
    place = torch.arange(m, device=scores.device).expand(scores.shape)
    ranked = ranked_keys(scores)
    # The keys that beat rank r are ranked[:r]; it is dropped by the w-th of them to arrive.
    dropped = torch.where(place >= window, _smallest(ranked, place, window - 1), m)
    until = torch.empty_like(dropped).scatter(-1, ranked, dropped)
    return torch.where((until > place) & (scores > -torch.inf), until, 0)


def ranked_keys(scores: Tensor) -> Tensor:
    """Keys from the best to the worst, of equal ones the later first, int64 ``(..., M)``."""
    m = scores.shape[-1]
    return m - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)


def _smallest(values: Tensor, ends: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest (from 0) of ``values[..., :end]`` for every end, by a wavelet matrix.

    Args:
        values: each row a permutation of ``0..M-1``.
        ends: int64, the shape of ``values``; what is returned for ``end <= k`` means nothing.
    """
    m = values.shape[-1]
    low, found = torch.zeros_like(ends), torch.zeros_like(ends)
    left = torch.full_like(ends, k)
    for bit in reversed(range(max(m - 1, 0).bit_length())):
        ones = values >> bit & 1
        zeros_before = F.pad((1 - ones).cumsum(-1), (1, 0))
        total = zeros_before[..., -1:]
        # Zeros go to the front and ones behind them, both in their order.
        at, z = torch.arange(m, device=values.device), zeros_before[..., :-1]
        values = torch.empty_like(values).scatter(
            -1, torch.where(ones == 1, total + at - z, z), values
        )
        z_low, z_end = zeros_before.gather(-1, low), zeros_before.gather(-1, ends)
        up = left >= z_end - z_low
        left = torch.where(up, left - (z_end - z_low), left)
        low = torch.where(up, total + low - z_low, z_low)
        ends = torch.where(up, total + ends - z_end, z_end)
        found = found | up.long() << bit
    return found


@dataclass(frozen=True, eq=False)
class KeptKeys(Mask):
    """Rows ``i < until[j]`` read key ``j``, causally or not: what :func:`dynamic_mask` makes.

    Args:
        until: int64 ``(B, Hkv, M)``, from :func:`kept_until`; without ``causal`` 0 or ``M``.
        group: query heads a key head.
        causal: whether ``j <= i`` as well.
    """

    until: Tensor
    group: int = 1
    causal: bool = True
    _ranges: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.until.dim() != 3 or self.until.dtype != torch.int64:
            raise ValueError(
                f"KeptKeys: until must be int64 (B, Hkv, M), got {self.until.dtype} "
                f"{tuple(self.until.shape)}"
            )
        if self.group < 1:
            raise ValueError(f"KeptKeys: group must be an integer >= 1, got {self.group!r}")

    @property
    def heads(self) -> int:
        return self.until.shape[1] * self.group

    @property
    def batch(self) -> int:
        return self.until.shape[0]

    closed = True

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if m > self.until.shape[-1] or (self.causal and n > m):
            raise ValueError(
                f"KeptKeys: made for {self.until.shape[-1]} keys, the call has {n} queries, {m} keys"
            )

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        until = self.until.to(j.device)[b, h // self.group, j]
        # Without causality rows may lie outside 0..M-1, where there are more queries than keys.
        return (j <= i) & (i < until) if self.causal else (until > 0).expand((i + until).shape)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Exact, by the largest and the smallest ``until`` of the keys."""
        h = h // self.group
        if not self.causal:
            some = self._extreme(0, j0, j1, h, b) > 0
            every = self._extreme(1, j0, j1, h, b) < 0
            shape = (i0 + j0 + some).shape
            return some.expand(shape), every.expand(shape)
        # A kept key j <= i1 that outlives row i0 is read by row max(i0, j).
        last = torch.minimum(j1, i1)
        some = (last >= j0) & (self._extreme(0, j0, torch.maximum(last, j0), h, b) > i0)
        return some, (j1 <= i0) & (-self._extreme(1, j0, j1, h, b) > i1)

    def _extreme(self, which: int, j0: Tensor, j1: Tensor, h: Index, b: Index) -> Tensor:
        """The largest of ``until`` (or of ``-until``) over keys ``j0..j1``, by doubled ranges."""
        if not self._ranges:
            level = torch.stack([self.until, -self.until])
            levels = [level]
            for bit in range((level.shape[-1]).bit_length() - 1):
                # Entry j covers keys j..j + 2^(bit+1) - 1; those beyond the end are not asked for.
                level = torch.maximum(level, level.roll(-(1 << bit), -1))
                levels.append(level)
            self._ranges.append(torch.stack(levels))
        table = self._ranges[0].to(j0.device)
        j0, j1 = torch.broadcast_tensors(j0, j1)
        size = j1 - j0 + 1
        level = torch.zeros_like(size)
        for bit in range(1, table.shape[0]):
            level = level + (size >= 1 << bit)
        return torch.maximum(
            table[level, which, b, h, j0], table[level, which, b, h, j1 - (1 << level) + 1]
        )

    def lists(self, n: int, m: int, block_q: int = 64) -> BlockLayout:
        """For each ``block_q`` rows the keys that any of them reads, ``w + block_q`` at most.

        The layout's key blocks are single keys. Work and memory grow with the listed keys, O(N w).
        The rows' own tokens are listed whether kept or not: what a row computes must not depend, not
        even in rounding, on which of the tokens after it are kept.
        """
        self.check(n, m)
        (batch, heads, _), device = self.until.shape, self.until.device
        until = self.until[..., :m]
        rows = -(-n // block_q)
        place = torch.arange(m, device=device).expand(until.shape)
        if self.causal:
            own = place - (m - n)
            first, last = own.clamp(min=0), until.clamp(max=m) - 1 - (m - n)
        else:
            first, last = torch.zeros_like(until), torch.where(until > 0, n, 0) - 1
        start, end = first // block_q, last.div(block_q, rounding_mode="floor")
        count = (end - start + 1).clamp(min=0) * (last >= first)
        if self.causal:
            count = torch.where(own >= 0, count.clamp(min=1), count)
        flat = count.flatten()
        key = torch.arange(flat.numel(), device=device).repeat_interleave(flat)
        nth = torch.arange(key.numel(), device=device) - (flat.cumsum(0) - flat)[key]
        row = start.flatten()[key] + nth
        line = key // max(m, 1) * rows + row
        line, order = line.sort(stable=True)
        key, row = key[order], row[order]
        lines = batch * heads * rows
        index, width = pack_lists(line, key % max(m, 1), lines)
        inside = (first.flatten()[key] > row * block_q) | (
            last.flatten()[key] < ((row + 1) * block_q).clamp(max=n) - 1
        )
        partial, _ = pack_lists(line, inside.long(), lines)
        shape = (batch, heads, rows, width)
        index, partial = (x.view(shape).repeat_interleave(self.group, 1) for x in (index, partial))
        return BlockLayout(n, m, block_q, 1, index, partial == 1, self)

    def blocks(self, n: int, m: int, block_q: int = 64) -> BlockLayout:
        """All causal blocks, this mask inside: for windows that leave out little of a short sequence."""
        self.check(n, m)
        index = Causal().layout(n, m, (block_q, 64), device=self.until.device).index
        index = index.expand(self.batch, self.heads, -1, -1).contiguous()
        return BlockLayout(n, m, block_q, 64, index, torch.ones_like(index, dtype=torch.bool), self)


def dynamic_mask(
    scores: Tensor, window: int, mask: Mask | None = None, *, n: int | None = None, group: int = 1
) -> Mask:
    """Where a row may look: at the ``window`` best of the keys that ``mask`` lets it see.

    Causal masks (with padding, ``Causal() & Keys(...)``) and ``Full()`` take O(M log M) work and one
    number a key. Any other mask is evaluated pair by pair, O(N M) in work and memory.

    Args:
        scores: ``(B, Hkv, M)``, one score a key and key head, the same for all queries. Of equal
            scores the later key wins. No gradient flows through the choice.
        window: ``w >= 1``, keys a row.
        mask: what may be chosen from, ``None`` means causal. With ``Full()`` (cross-attention) all
            rows share one list.
        n: queries, the last of ``M`` positions; default ``M``. Only other masks need it.
        group: query heads a key head, for the heads of the mask that is returned.

    Raises:
        ValueError: ``window`` below 1, or scores that are not ``(B, Hkv, M)``.
    """
    check_window("dynamic_mask", window)
    if scores.dim() != 3:
        raise ValueError(f"dynamic_mask: scores must be (B, Hkv, M), got {tuple(scores.shape)}")
    scores = scores.detach()
    kind, valid = mask_kind(mask)
    if valid is not None:
        if valid.shape[-1] < scores.shape[-1]:
            raise ValueError(
                f"dynamic_mask: mask covers {valid.shape[-1]} keys, expected {scores.shape[-1]}"
            )
        valid = valid[..., : scores.shape[-1]].to(scores.device)
        scores = scores.masked_fill(~(valid if valid.dim() == 1 else valid[:, None]), -torch.inf)
    if kind == "causal":
        return KeptKeys(kept_until(scores, window), group)
    if kind == "full":
        # What the last of all rows keeps, shared by all.
        kept = kept_until(scores, window) == scores.shape[-1]
        return KeptKeys(torch.where(kept, scores.shape[-1], 0), group, causal=False)
    assert mask is not None
    m = scores.shape[-1]
    n = m if n is None else n
    allowed = mask.dense(n, m, device=scores.device)
    allowed = allowed[(None,) * (4 - allowed.dim())]
    level = scores[:, :, None].expand(-1, -1, n, -1).repeat_interleave(group, 1)
    chosen = choose_blocks(level, allowed, window, prefer="late")
    return Dense(chosen & allowed)


def mask_kind(mask: Mask | None) -> tuple[str, Tensor | None]:
    """Whether a mask is causal, full or another, and the keys that are no padding."""
    parts = mask.parts if isinstance(mask, And) else (Causal() if mask is None else mask,)
    rest = [part for part in parts if not isinstance(part, Keys)]
    valid: Tensor | None = None
    for part in parts:
        if isinstance(part, Keys):
            valid = part.valid if valid is None else valid & part.valid
    if all(isinstance(part, (Causal, Full)) for part in rest):
        return "causal" if any(isinstance(part, Causal) for part in rest) else "full", valid
    return "other", None
