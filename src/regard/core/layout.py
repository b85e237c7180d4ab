"""Layouts made from masks and from lists; :class:`BlockLayout` itself stands beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_layout import BlockLayout as BlockLayout
from .block_layout import Index as Index

if TYPE_CHECKING:
    from .mask import Mask

# Pairs evaluated at once where a mask has no closed form: 8 MB of int64 positions.
_STRIP = 1 << 20


def pack_lists(line: Tensor, value: Tensor, lines: int) -> tuple[Tensor, int]:
    """Ragged lists, given as (line, value) sorted by line, as a tensor padded with -1."""
    counts = torch.bincount(line, minlength=lines)
    width = int(counts.max()) if lines else 0
    starts = counts.cumsum(0) - counts
    out = value.new_full((lines, width), -1)
    out[line, torch.arange(len(line), device=line.device) - starts[line]] = value
    return out, width


def head_batch_index(mask: Mask, device: Any = None) -> tuple[Index, Index]:
    """Head index ``(1, H, 1, 1)`` and batch index ``(B, 1, 1, 1)`` of a mask; 0 where it has none."""
    h: Index = 0
    b: Index = 0
    if mask.heads is not None:
        h = torch.arange(mask.heads, device=device).view(1, -1, 1, 1)
    if mask.batch is not None:
        b = torch.arange(mask.batch, device=device).view(-1, 1, 1, 1)
    return h, b


def build_layout(
    mask: Mask, n: int, m: int, block: int | tuple[int, int], device: Any = None
) -> BlockLayout:
    """The layout of a mask, made in strips of query blocks: see :meth:`Mask.layout`."""
    bq, bk = (block, block) if isinstance(block, int) else block
    nq, nk = -(-n // bq), -(-m // bk)
    hl, bl = (1 if x is None else x for x in (mask.heads, mask.batch))
    h, b = head_batch_index(mask, device)
    i0 = torch.arange(nq, device=device)[:, None] * bq
    i1 = (i0 + bq).clamp(max=n) - 1
    j0 = torch.arange(nk, device=device)[None, :] * bk
    j1 = (j0 + bk).clamp(max=m) - 1
    strip = max(1, 4 * _STRIP // max(1, nk * hl * bl))
    lines, keys, flags = [], [], []
    for start in range(0, nq, strip):
        rows = slice(start, start + strip)
        shape = (bl, hl, i0[rows].shape[0], nk)
        some, every = mask.tile(i0[rows] + m - n, i1[rows] + m - n, j0, j1, h, b)
        some, every = some.expand(shape), every.expand(shape)
        at = some.nonzero()
        part = ~every[some]
        if not mask.closed:
            at, part = _look_inside(mask, at, part, n, m, bq, bk, start)
        bb, hh, row, key = at.unbind(-1)
        lines.append((bb * hl + hh) * nq + row + start)
        keys.append(key)
        flags.append(part)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    line = torch.cat([empty, *lines])
    order = torch.argsort(line, stable=True) if bl * hl > 1 else slice(None)
    line = line[order]
    index, width = pack_lists(line, torch.cat([empty, *keys])[order], bl * hl * nq)
    partial, _ = pack_lists(line, torch.cat([empty, *flags])[order].long(), bl * hl * nq)
    shape = (bl, hl, nq, width)
    return BlockLayout(n, m, bq, bk, index.view(shape), partial.view(shape) == 1, mask)


def _look_inside(
    mask: Mask, at: Tensor, part: Tensor, n: int, m: int, bq: int, bk: int, start: int
) -> tuple[Tensor, Tensor]:
    """Exact states of the candidate blocks ``at`` (batch, head, row in strip, key block)."""
    any_allowed, all_allowed = torch.ones_like(part), ~part
    doubtful = part.nonzero()[:, 0]
    side_q = torch.arange(bq, device=at.device)
    side_k = torch.arange(bk, device=at.device)
    for pick in doubtful.split(max(1, _STRIP // (bq * bk))):
        b, h, row, key = at[pick].unbind(-1)
        i = (row[:, None] + start) * bq + side_q
        j = key[:, None] * bk + side_k
        real = (i < n)[:, :, None] & (j < m)[:, None, :]
        i = i.clamp(max=n - 1)[:, :, None] + m - n
        j = j.clamp(max=m - 1)[:, None, :]
        ok = mask.allows(i, j, h[:, None, None], b[:, None, None]).expand_as(real)
        any_allowed[pick] = (ok & real).flatten(1).any(1)
        all_allowed[pick] = (ok | ~real).flatten(1).all(1)
    return at[any_allowed], ~all_allowed[any_allowed]
