"""The walk over the weight matrix: which tiles there are, and how their weights are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from .balance import balanced
from .bias import Bias
from .layout import BlockLayout
from .stat_tile import Shape, Tile, Where

# Weights held at once: 4 MB of float32 stay in a CPU's cache, a GPU wants more work at a time.
_BUDGET = {"cpu": 1 << 20, "cuda": 1 << 24}
# With fewer rows the product with the keys would wait for memory.
_LEAST_ROWS = 64


@dataclass(frozen=True)
class _Part:
    """Heads that read the same keys: batch entries, key heads, and one or all of their group."""

    batch: range
    kv: range
    member: int | None
    head: int


@dataclass(frozen=True)
class _Columns:
    """The keys of one query block: where they stand, and the stretches that need the mask."""

    keys: Where
    j: Tensor
    partial: list[tuple[int, int]]


class Scores:
    """Weights of any rows on any keys, written into one buffer that is used again and again."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        shape: Shape,
        bias: Bias | None,
        scale: float,
        lse: Tensor | None,
    ) -> None:
        self.shape, self.scale, self.kv_heads = shape, scale, k.shape[1]
        self.group = shape.heads // k.shape[1]
        self.q = self._grouped(q)
        self.k = k.to(shape.dtype)
        self.bias = bias
        self.phi_q: Tensor | None = None
        factors = None if bias is None else bias.factors(shape.n, shape.m)
        if factors is not None and factors[1].shape[1] in (1, self.kv_heads):
            # The bias as extra channels costs no pass over the tile.
            phi_q, phi_k = (phi.to(q.device, shape.dtype) for phi in factors)
            self.k = torch.cat([self.k, phi_k.expand(*k.shape[:3], -1)], -1)
            phi_q = phi_q.expand(shape.batch, shape.heads, -1, -1)
            self.phi_q = self._grouped(phi_q)
            self.bias = None
        self.lse: Tensor | None = None
        if lse is not None:
            # A row without keys has lse -inf; against +inf all its weights become 0.
            flat = lse.to(shape.dtype).reshape(shape.streams, shape.n)
            self.lse = flat.masked_fill(flat == float("-inf"), float("inf"))
        self.budget = _BUDGET.get(q.device.type, _BUDGET["cuda"])
        most = max(self.budget + self.group * shape.m, (_LEAST_ROWS + self.group) * shape.m)
        most = min(most, shape.streams * shape.n * shape.m)
        self.buffer = torch.empty(most, dtype=shape.dtype, device=q.device)
        self.pool: list[Tensor] = []

    def _grouped(self, x: Tensor) -> Tensor:
        """`(B, H, N, D)` as `(B, Hkv, group, N, D)`, without a copy."""
        batch, heads, length, width = x.shape
        return x.view(batch, self.kv_heads, heads // self.kv_heads, length, width)

    def tile(
        self,
        part: _Part,
        rows: Where,
        i: Tensor,
        columns: _Columns,
        masked: list[tuple[int, int, Tensor]],
    ) -> Tile:
        """The weights of some rows; `part` must fit into the buffer."""
        batch, kv = (slice(x.start, x.stop) for x in (part.batch, part.kv))
        member = slice(None) if part.member is None else slice(part.member, part.member + 1)
        q = self.q[batch, kv, member][:, :, :, rows].to(self.shape.dtype) * self.scale
        if self.phi_q is not None:
            q = torch.cat([q, self.phi_q[batch, kv, member][:, :, :, rows]], -1)
        k = self.k[batch, kv][:, :, columns.keys]
        heads, group, n, m = q.shape[0] * q.shape[1], q.shape[2], q.shape[3], k.shape[2]
        p = self.buffer[: heads * group * n * m].view(heads, group * n, m)
        # Grouped heads are more rows against the same keys, so no key is repeated.
        left, right = q.reshape(heads, group * n, -1), k.reshape(heads, m, -1)
        torch.bmm(left, right.transpose(1, 2), out=p)
        p = p.view(heads * group, n, m)
        first = (part.batch.start * self.kv_heads + part.kv.start) * self.group
        first += part.member or 0
        streams = slice(first, first + heads * group)
        dead = self._finish(p, streams, rows, i, columns, masked)
        whole = self.lse is None
        return Tile(p, streams, rows, columns.keys, i, columns.j, masked, dead, whole, self.pool)

    def _finish(
        self,
        p: Tensor,
        streams: slice,
        rows: Where,
        i: Tensor,
        columns: _Columns,
        masked: list[tuple[int, int, Tensor]],
    ) -> Tensor | None:
        """Turn scores into weights, in place. Returns which rows see nothing, or None."""
        dead: Tensor | None = None
        if self.bias is not None:
            at = torch.arange(streams.start, streams.stop, device=p.device)[:, None, None]
            b = torch.div(at, self.shape.heads, rounding_mode="floor")
            p += self.bias.scores(i[:, None], columns.j, at % self.shape.heads, b)
        for start, stop, allowed in masked:
            p[:, :, start:stop].masked_fill_(~allowed, float("-inf"))
        if self.lse is not None:
            p.sub_(self.lse[streams, rows].unsqueeze(-1)).exp_()
            return None
        if self.bias is not None:
            dead = p.amax(-1) == float("-inf")
        elif sum(stop - start for start, stop, _ in masked) == p.shape[-1]:
            alive = torch.stack([allowed.any(-1) for _, _, allowed in masked]).any(0)
            dead = None if bool(alive.all()) else ~alive
        torch.softmax(p, -1, out=p)
        if dead is not None:
            p.masked_fill_(dead.unsqueeze(-1), 0.0)
        return dead


def tiles(scores: Scores, layout: BlockLayout | None, side: int) -> Iterator[Tile]:
    """All tiles: every row that may see a key is in exactly one for each head.

    Args:
        layout: key blocks to read and the mask inside them; None reads all keys.
        side: rows at a time where there is no layout.
    """
    shape, device = scores.shape, scores.q.device
    side = side if layout is None else layout.block_q
    everything = _Columns(slice(0, shape.m), torch.arange(shape.m, device=device), [])
    for part in _parts(scores, layout):
        group = scores.group if part.member is None else 1
        for block, r0 in zip(count(), range(0, shape.n, side), strict=False):
            r1 = min(r0 + side, shape.n)
            columns = everything if layout is None else _columns(scores, layout, part, block)
            m = columns.j.shape[0]
            if m == 0:
                continue
            pieces = -(-(r1 - r0) * group * m // scores.budget)
            step = max(-(-(r1 - r0) // pieces), -(-_LEAST_ROWS // group))
            for start in range(r0, r1, step):
                stop = min(start + step, r1)
                rows, i = _rows(scores, layout, part, start, stop)
                masked = []
                if layout is not None and layout.mask is not None:
                    for c0, c1 in columns.partial:
                        allowed = layout.mask.allows(
                            i[:, None], columns.j[None, c0:c1], part.head, part.batch.start
                        )
                        masked.append((c0, c1, allowed.expand(stop - start, c1 - c0)))
                for one in _chunks(part, scores.budget // (group * (stop - start) * m)):
                    yield scores.tile(one, rows, i, columns, masked)


def _parts(scores: Scores, layout: BlockLayout | None) -> Iterator[_Part]:
    """Split the call into heads that read the same keys."""
    shape, kv_heads, group = scores.shape, scores.kv_heads, scores.group
    batches, heads = 1, 1
    if layout is not None:
        for x in (layout.index, layout.perm_q, layout.perm_k):
            if x is not None:
                batches, heads = max(batches, x.shape[0]), max(heads, x.shape[1])
        if layout.mask is not None:
            batches = max(batches, layout.mask.batch or 1)
            heads = max(heads, layout.mask.heads or 1)
    if batches == 1 and heads == 1:
        yield _Part(range(shape.batch), range(kv_heads), None, 0)
        return
    for b in range(shape.batch):
        entry = range(b, b + 1)
        if heads == 1:
            yield _Part(entry, range(kv_heads), None, 0)
        elif heads == kv_heads:
            for h in range(kv_heads):
                yield _Part(entry, range(h, h + 1), None, h)
        else:
            for h in range(shape.heads):
                yield _Part(entry, range(h // group, h // group + 1), h % group, h)


def _chunks(part: _Part, room: int) -> Iterator[_Part]:
    """Pieces of at most `room` key heads whose heads stand side by side in memory."""
    every = len(part.kv)
    entries = room // every
    if entries and balanced(entries * every) == entries * every:
        for b in range(0, len(part.batch), entries):
            yield _Part(part.batch[b : b + entries], part.kv, part.member, part.head)
        return
    step = balanced(min(room, every))
    for entry in part.batch:
        for h in range(0, every, step):
            yield _Part(range(entry, entry + 1), part.kv[h : h + step], part.member, part.head)


def _place(x: Tensor, scores: Scores, part: _Part) -> tuple[int, int]:
    """Batch and head index of this part in a tensor whose first two axes may be shared."""
    b = 0 if x.shape[0] == 1 else part.batch.start
    if x.shape[1] == 1:
        return b, 0
    shared = x.shape[1] == scores.kv_heads and part.member is not None
    return b, part.head // scores.group if shared else part.head


def _rows(
    scores: Scores, layout: BlockLayout | None, part: _Part, start: int, stop: int
) -> tuple[Where, Tensor]:
    """Where the rows of these slots stand, and their positions."""
    offset = scores.shape.m - scores.shape.n
    if layout is None or layout.perm_q is None:
        at = torch.arange(start, stop, device=scores.q.device)
        return slice(start, stop), at + offset
    rows = layout.perm_q[_place(layout.perm_q, scores, part)][start:stop].to(scores.q.device)
    return rows, rows + offset


def _columns(scores: Scores, layout: BlockLayout, part: _Part, block: int) -> _Columns:
    """The keys that a query block reads."""
    at = _place(layout.index, scores, part)
    ids = layout.index[at][block].tolist()
    flags = layout.partial[at][block].tolist()
    runs: list[tuple[int, int, bool]] = []
    for key, flag in zip(ids, flags, strict=True):
        if key < 0:
            break
        start, stop = key * layout.block_k, min((key + 1) * layout.block_k, layout.m)
        if runs and runs[-1][1] == start and runs[-1][2] == flag:
            start = runs.pop()[0]
        runs.append((start, stop, flag))
    partial, width = [], 0
    for start, stop, flag in runs:
        if flag:
            partial.append((width, width + stop - start))
        width += stop - start
    device = scores.q.device
    if not runs:
        return _Columns(slice(0, 0), torch.arange(0, device=device), [])
    first, last = runs[0][0], runs[-1][1]
    if layout.perm_k is None and last - first == width:
        return _Columns(slice(first, last), torch.arange(first, last, device=device), partial)
    slots = torch.cat([torch.arange(start, stop, device=device) for start, stop, _ in runs])
    if layout.perm_k is not None:
        slots = layout.perm_k[_place(layout.perm_k, scores, part)].to(device)[slots]
    return _Columns(slots, slots, partial)
