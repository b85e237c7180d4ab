"""Tiles of a layout that differs between heads or batch entries: gathered key blocks.

A unit is one query block of one (batch, head). Units with equally many key blocks are computed
together, a few at a time, so that the gathered keys stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..balance import balanced
from ..layout import BlockLayout
from .tiles import Scratch

# Scores of one tile: 2 MB in float32, half of a slice's, because gathered keys share the caches.
_PAIRS = 1 << 19


def _as_blocks(x: Tensor, side: int, group: int = 1, fill: float = 0.0) -> Tensor:
    """(B, U * group, L, D) as blocks (B * U * blocks, group * side, D), padded at the end."""
    b, h, length, d = x.shape
    blocks = -(-length // side)
    if blocks * side != length:
        x = F.pad(x, (0, 0, 0, blocks * side - length), value=fill)
    x = x.reshape(b, h // group, group, blocks, side, d)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b * (h // group) * blocks, group * side, d)


def _from_blocks(x: Tensor, b: int, units: int, group: int, length: int, side: int) -> Tensor:
    """The inverse of :func:`_as_blocks`."""
    blocks = -(-length // side)
    x = x.view(b, units, blocks, group, side, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, units * group, blocks * side, x.shape[-1])[:, :, :length]


def _permute(x: Tensor, perm: Tensor | None) -> Tensor:
    """Rows of ``x`` (B, H, L, D) in the order of ``perm`` (Bp, Hp, L)."""
    return x if perm is None else x.gather(2, _wide(perm, x))


def _restore(x: Tensor, perm: Tensor | None) -> Tensor:
    """Undo :func:`_permute`."""
    return x if perm is None else torch.empty_like(x).scatter_(2, _wide(perm, x), x)


def _wide(perm: Tensor, x: Tensor) -> Tensor:
    """A permutation (Bp, Hp, L) as an index into ``x`` (B, H, L, D); heads of a group share it."""
    if perm.shape[1] not in (1, x.shape[1]):
        perm = perm.repeat_interleave(x.shape[1] // perm.shape[1], dim=1)
    return perm.unsqueeze(-1).expand(x.shape)


def _token_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Single tokens of ``x`` (B, H, L, D) as rows, and the first row of each of its B * H lines.

    A slice of a larger cache is read where it lies: copying it would cost more than the attention.
    """
    b, h, length, d = x.shape
    over_b, over_h, over_l, inner = x.stride()
    if inner != 1 or over_l != d or over_h % d or over_b % d:
        x = x.contiguous()
        over_b, over_h = h * length * d, length * d
    batch, head = (torch.arange(size, device=x.device) for size in (b, h))
    start = (batch[:, None] * (over_b // d) + head * (over_h // d)).flatten()
    rows = (b - 1) * (over_b // d) + (h - 1) * (over_h // d) + length
    return x.as_strided((rows, d), (d, 1)), start


class GatheredTiles:
    """Iterates over groups of units with equally many key blocks."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> None:
        h = q.shape[1]
        self.layout, self.scratch = layout, Scratch()
        self.b, self.h, self.n, self.d = q.shape
        self.hkv, self.m, self.dv_width = k.shape[1], k.shape[2], v.shape[3]
        shared = h // self.hkv
        # Heads that share a list are folded into rows; otherwise every query head is its own unit.
        self.group = shared if layout.index.shape[1] in (1, self.hkv) else 1
        self.units = h // self.group
        # A permutation of keys that differs between the heads of a group needs copies of them.
        perm_k = layout.perm_k
        self.copies = 1 if perm_k is None or perm_k.shape[1] in (1, self.hkv) else shared
        if self.copies > 1:
            k, v = k.repeat_interleave(self.copies, 1), v.repeat_interleave(self.copies, 1)
        bq, bk = layout.block
        self.by_token = self._few()
        self.q = _as_blocks(_permute(q, layout.perm_q), bq, self.group)
        self.start_k, self.start_v = None, None
        if self.by_token:
            self.k, self.start_k = _token_rows(k)
            self.v, self.start_v = _token_rows(v)
        else:
            self.k = _as_blocks(_permute(k, layout.perm_k), bk).flatten(1)
            self.v = _as_blocks(_permute(v, layout.perm_k), bk).flatten(1)
        self.out = v.new_zeros(len(self.q), self.group * bq, v.shape[3])
        self.lse = q.new_full((len(self.q), self.group * bq), float("-inf"))

    def _few(self) -> bool:
        """Whether the call reads less than the copy would that makes whole blocks of the keys.

        As in decoding over a cache that no block divides: single keys are gathered then.
        """
        layout = self.layout
        if layout.perm_k is not None or self.m % layout.block_k == 0:
            return False
        read = int(layout.counts.expand(self.b, self.units, -1).sum()) * layout.block_k
        return 2 * read <= self.b * self.hkv * self.m

    def __iter__(self) -> Iterator[GatheredTile]:
        layout = self.layout
        counts = layout.counts.expand(self.b, self.units, -1).reshape(-1).cpu()
        order = torch.argsort(counts, stable=True)
        sizes, amounts = torch.unique_consecutive(counts[order], return_counts=True)
        start = 0
        for size, amount in zip(sizes.tolist(), amounts.tolist(), strict=True):
            if size:
                units = Units(self, order[start : start + amount].to(self.q.device), size)
                step = balanced(_PAIRS // (self.group * layout.block_q * size * layout.block_k))
                for first in range(0, amount, step):
                    yield GatheredTile(self, units, first, min(first + step, amount))
            start += amount

    def result(self) -> tuple[Tensor, Tensor]:
        layout, side = self.layout, self.layout.block_q
        out = _from_blocks(self.out, self.b, self.units, self.group, self.n, side)
        lse = self.lse.unsqueeze(-1)
        lse = _from_blocks(lse, self.b, self.units, self.group, self.n, side)
        return _restore(out, layout.perm_q), _restore(lse, layout.perm_q).squeeze(-1)

    def open_gradients(self, grad_out: Tensor, delta: Tensor, lse: Tensor) -> None:
        perm, side = self.layout.perm_q, self.layout.block_q
        self.grad_out = _as_blocks(_permute(grad_out, perm), side, self.group)
        self.delta = _as_blocks(_permute(delta.unsqueeze(-1), perm), side, self.group)
        # Rows past the end get weight exp(-inf) = 0, so that they reach no key's gradient.
        lse = _permute(lse.unsqueeze(-1), perm)
        self.lse = _as_blocks(lse, side, self.group, fill=float("inf"))
        self.dq, self.dk, self.dv = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
        if self.by_token:
            lines = self.b * self.hkv * self.m
            self.dk, self.dv = (x.new_zeros(lines, x.shape[1]) for x in (self.k, self.v))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        layout = self.layout
        dq = _from_blocks(self.dq, self.b, self.units, self.group, self.n, layout.block_q)
        if self.by_token:
            dk, dv = (x.view(self.b, self.hkv, self.m, -1) for x in (self.dk, self.dv))
            return dq, dk, dv
        sides = []
        for x, width in ((self.dk, self.d), (self.dv, self.dv_width)):
            x = x.view(-1, layout.block_k, width)
            x = _from_blocks(x, self.b, self.hkv * self.copies, 1, self.m, layout.block_k)
            x = _restore(x, layout.perm_k)
            sides.append(x.unflatten(1, (self.hkv, self.copies)).sum(2) if self.copies > 1 else x)
        return _restore(dq, layout.perm_q), sides[0], sides[1]


class Units:
    """All units with equally many key blocks, and where their blocks stand."""

    def __init__(self, tiles: GatheredTiles, unit: Tensor, size: int) -> None:
        layout = tiles.layout
        self.unit, self.size = unit, size
        self.row = unit % layout.query_blocks
        line = unit // layout.query_blocks
        self.batch, self.head = line // tiles.units, line % tiles.units
        # Indices into the layout, whose batch entries and heads may be shared.
        self.lb = self.batch if layout.index.shape[0] > 1 else torch.zeros_like(unit)
        self.lh = self.head if layout.index.shape[1] > 1 else torch.zeros_like(unit)
        self.blocks = layout.index[self.lb, self.lh, self.row, :size]
        key_heads = tiles.hkv * tiles.copies
        key_line = self.batch * key_heads + self.head // (tiles.units // key_heads)
        if tiles.by_token:
            # Slots past the end read the last key, and are masked.
            slot = torch.arange(layout.block_k, device=unit.device)
            at = (self.blocks[..., None] * layout.block_k + slot).clamp(max=tiles.m - 1)
            self.token, self.key_line = at.flatten(1), key_line
            self.address = key_line[:, None] * tiles.m + self.token
        else:
            self.address = key_line[:, None] * layout.key_blocks + self.blocks
        flags = layout.partial[self.lb, self.lh, self.row, :size]
        if layout.mask is None:
            flags = torch.zeros_like(flags)
        self.may_be_empty = bool(flags.all(-1).any())
        self.partial = _Marked(flags)
        self.short = _Marked(self.blocks == tiles.m // layout.block_k)


class _Marked:
    """Marked (unit, slot) pairs, found once and cut into stretches of units."""

    def __init__(self, flags: Tensor) -> None:
        self.unit, self.slot = flags.nonzero().unbind(-1)
        self.ends = [0, *flags.sum(-1).cumsum(0).tolist()]

    def between(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Units, counted from ``first``, and slots of the marks of units ``first:last``."""
        cut = slice(self.ends[first], self.ends[last])
        return self.unit[cut] - first, self.slot[cut]


class GatheredTile:
    """Units ``first:last`` of equally many, each against its gathered key blocks."""

    def __init__(self, tiles: GatheredTiles, units: Units, first: int, last: int) -> None:
        self.tiles, self.units, self.first, self.last = tiles, units, first, last
        self.count = last - first
        self.unit = units.unit[first:last]
        self.address = units.address[first:last].flatten()
        self.scratch = tiles.scratch
        self.q = tiles.q.index_select(0, self.unit)
        self.k = self._gather("k", tiles.k, tiles.start_k).view(self.count, -1, tiles.d)
        self.v = self._gather("v", tiles.v, tiles.start_v).view(self.count, -1, tiles.dv_width)

    def _gather(self, name: str, rows: Tensor, start: Tensor | None) -> Tensor:
        address = self.address
        if start is not None:
            cut = slice(self.first, self.last)
            line = self.units.key_line[cut]
            address = (start[line][:, None] + self.units.token[cut]).flatten()
        out = self.scratch.take(name, (len(address), rows.shape[1]), rows)
        return torch.index_select(rows, 0, address, out=out)

    @property
    def may_be_empty(self) -> bool:
        return self.units.may_be_empty

    def block(self, scores: Tensor) -> None:
        layout, size = self.tiles.layout, self.units.size
        sides = (layout.block_q, size, layout.block_k)
        split = scores.view(self.count, self.tiles.group, *sides)
        # A short last block carries padding keys, which nobody may read.
        at, slot = self.units.short.between(self.first, self.last)
        if len(at):
            split[at, :, :, slot, self.tiles.m % layout.block_k :] = float("-inf")
        at, slot = self.units.partial.between(self.first, self.last)
        if not len(at):
            return
        ok = self._allowed(at + self.first, slot)
        if len(at) == self.count * size:
            ok = ok.view(self.count, size, layout.block_q, layout.block_k)
            split.masked_fill_(~ok.transpose(1, 2).unsqueeze(1), float("-inf"))
        else:
            part = split[at, :, :, slot].masked_fill(~ok.unsqueeze(1), float("-inf"))
            split[at, :, :, slot] = part

    def _allowed(self, at: Tensor, slot: Tensor) -> Tensor:
        """The mask inside blocks (unit, slot): bool (P, block_q, block_k)."""
        layout, units = self.tiles.layout, self.units
        assert layout.mask is not None
        b, h = units.lb[at], units.lh[at]
        i = layout.positions(b, h, units.row[at], keys=False).clamp(min=layout.m - layout.n)
        j = layout.positions(b, h, units.blocks[at, slot], keys=True).clamp(min=0)
        ok = layout.mask.allows(i[:, :, None], j[:, None, :], h[:, None, None], b[:, None, None])
        return ok.expand(-1, layout.block_q, layout.block_k)

    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles, layout, units = self.tiles, self.tiles.layout, self.units
        cut = slice(self.first, self.last)
        lb, lh = units.lb[cut], units.lh[cut]
        i = layout.positions(lb, lh, units.row[cut], keys=False).clamp(min=layout.m - layout.n)
        lb, lh = (x.repeat_interleave(units.size) for x in (lb, lh))
        j = layout.positions(lb, lh, units.blocks[cut].flatten(), keys=True).clamp(min=0)
        j = j.view(self.count, -1)
        h = units.head[cut, None] * tiles.group + torch.arange(tiles.group, device=i.device)
        return (
            i[:, None, :, None],
            j[:, None, None, :],
            h[:, :, None, None],
            units.batch[cut, None, None, None],
        )

    def by_head(self, scores: Tensor) -> Tensor:
        return scores.view(self.count, self.tiles.group, -1, scores.shape[-1])

    def write(self, out: Tensor, lse: Tensor | None) -> None:
        self.tiles.out.index_copy_(0, self.unit, out)
        if lse is not None:
            self.tiles.lse.index_copy_(0, self.unit, lse)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        tiles = self.tiles
        grad_out, delta, lse = (
            x.index_select(0, self.unit) for x in (tiles.grad_out, tiles.delta, tiles.lse)
        )
        return grad_out, delta, lse

    def add(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        tiles = self.tiles
        tiles.dq.index_copy_(0, self.unit, dq)
        tiles.dk.index_add_(0, self.address, dk.reshape(len(self.address), -1))
        tiles.dv.index_add_(0, self.address, dv.reshape(len(self.address), -1))
