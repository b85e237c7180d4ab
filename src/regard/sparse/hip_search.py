"""HiP's tree search: from evenly cut spans of key blocks to the ones that hold the best keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.call import compute_dtype
from ..core.layout import head_batch_index
from ..core.mask import Mask
from ..core.masks import Causal

# Entries of the keys gathered for one strip of query blocks: 8 MB of float32.
_STRIP = 1 << 21


def visible_keys(
    mask: Mask | None, n: int, m: int, block_q: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The stretch ``[first, end)`` of keys that holds all a query block may see.

    Args:
        mask: ``None`` means causal, for which the stretch ends with the block's own last row.
        n, m: numbers of queries and keys.
        block_q: queries a block.

    Returns:
        Two int64 tensors ``(Bl, Hl, nq)``; both 0 where a block sees nothing.
    """
    i0 = torch.arange(0, n, block_q, device=device)
    i1 = (i0 + block_q).clamp(max=n) - 1 + m - n
    if mask is None or mask == Causal():
        end = (i1 + 1).clamp(min=0)[None, None]
        return torch.zeros_like(end), end
    if not mask.closed:
        index = mask.layout(n, m, (block_q, 1), device=device).index
        first = torch.where(index < 0, m, index).amin(-1) if index.shape[-1] else index.sum(-1)
        end = index.amax(-1) + 1 if index.shape[-1] else first
        return torch.where(end > 0, first, 0), end
    i0, i1 = (i0 + m - n)[:, None], i1[:, None]
    h, b = head_batch_index(mask, device)
    shape = (mask.batch or 1, mask.heads or 1, len(i0), 1)
    zero = torch.zeros(shape, dtype=torch.int64, device=device)
    last = zero + m - 1
    # Bisection: the smallest x with an allowed pair in [0, x], the largest with one in [x, m - 1].
    low, high = zero, last
    left, right = zero, last
    for _ in range(max(m, 1).bit_length() if m else 0):
        middle = (low + high) // 2
        some, _ = mask.tile(i0, i1, zero, middle, h, b)
        low, high = torch.where(some, low, (middle + 1).clamp(max=m - 1)), high.where(~some, middle)
        middle = (left + right + 1) // 2
        some, _ = mask.tile(i0, i1, middle, last, h, b)
        left, right = torch.where(some, middle, left), right.where(some, (middle - 1).clamp(min=0))
    some = mask.tile(i0, i1, zero, last, h, b)[0].expand(shape) if m else zero > 0
    return torch.where(some, low, 0)[..., 0], torch.where(some, left + 1, 0)[..., 0]


def tree_search(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    end: Tensor,
    count: Tensor,
    *,
    keep: int,
    block_q: int,
    block_k: int,
) -> Tensor:
    """The key blocks that the search keeps for every query block (arXiv 2406.09827, Algorithm 1).

    ``keep`` spans of blocks are halved until they are single blocks. A half is worth the largest
    product ``q·k`` (unscaled) of the query block's odd rows with the keys of the half's first block;
    of the ``2 keep`` halves the ``keep`` best stay, of equals the earlier. An empty half never does.
    The first half inherits its span's worth, so that each round scores ``keep`` blocks.

    Args:
        q, k: ``(B, H, N, D)`` and ``(B, Hkv, M, D)``.
        first, end: stretch of keys of each query block, ``(1 or B, 1 or H, nq)``; keys outside do
            not count.
        count: blocks to search, from the one that holds ``first`` on, ``(1 or B, 1 or H, nq)``.
            Where there are no more than ``keep``, all of them are kept.
        keep: spans.

    Returns:
        int64 ``(B, H, nq, keep)``: ascending block ids, padded at the end with -1.
    """
    b, h, n, _ = q.shape
    nq = -(-n // block_q)
    start = (first // block_k).expand(b, h, nq).reshape(-1)
    length = count.expand(b, h, nq).reshape(-1)
    ids = torch.arange(keep, device=q.device).expand(len(start), keep)
    kept = torch.where(ids < length[:, None], ids + start[:, None], -1)
    if not bool((length > keep).any()):
        return kept.view(b, h, nq, keep)
    tree = _Tree(q, k, first, end, block_q, block_k)
    # Rounds of a unit: the halvings after which n / keep is at most 1.
    rounds = torch.zeros_like(length)
    reach, deepest = keep, int(length.max())
    while reach < deepest:
        rounds += length > reach
        reach *= 2
    step = max(1, _STRIP // max(1, keep * block_k * q.shape[3]))
    for depth in rounds[rounds > 0].unique().tolist():
        for unit in (rounds == depth).nonzero()[:, 0].split(step):
            kept[unit] = tree.search(unit, start[unit], length[unit], keep, depth)
    return kept.view(b, h, nq, keep)


class _Tree:
    """The tensors of one search. A unit is one query block of one head of one batch entry."""

    def __init__(
        self, q: Tensor, k: Tensor, first: Tensor, end: Tensor, block_q: int, block_k: int
    ) -> None:
        b, h, n, d = q.shape
        hkv, m = k.shape[1], k.shape[2]
        self.n, self.m, self.nq, self.side = n, m, -(-n // block_q), block_k
        self.heads, self.group, self.kv_heads = h, h // hkv, hkv
        self.q = q.reshape(b * h * n, d)
        self.rows = _odd_rows(n, block_q, q.device)
        # Keys are gathered in runs that divide the block and the cache, which is never padded: a
        # decoding step must not copy it.
        self.run = math.gcd(block_k, m)
        self.k = k.reshape(b * hkv * m // self.run, self.run * d)
        self.first = first.expand(b, h, self.nq).reshape(-1)
        self.end = end.expand(b, h, self.nq).reshape(-1)

    def search(self, unit: Tensor, start: Tensor, length: Tensor, keep: int, depth: int) -> Tensor:
        """Kept blocks ``(U, keep)``, ascending, of units that need ``depth`` rounds."""
        line = unit // self.nq
        queries = self.q[(line * self.n)[:, None] + self.rows[unit % self.nq]]
        queries = queries.to(compute_dtype(queries.dtype))
        key_line = line // self.heads * self.kv_heads + line % self.heads // self.group
        cuts = torch.arange(keep + 1, device=unit.device)
        edges = start[:, None] + length[:, None] * cuts // keep
        at, size = edges[:, :-1], edges.diff(dim=-1)
        worth = self._worth(unit, queries, key_line, at)
        for _ in range(depth):
            half = size // 2
            middle = at + half
            # Pairs (first half, second half) in order of place, which is also the order of ties.
            starts = torch.stack([at, middle], -1).flatten(1)
            sizes = torch.stack([half, size - half], -1).flatten(1)
            second = self._worth(unit, queries, key_line, middle)
            scores = torch.stack([worth, second], -1).flatten(1)
            best = _best(scores, sizes > 0, keep)
            at, size, worth = (x.flatten()[best].view(-1, keep) for x in (starts, sizes, scores))
        return at

    def _worth(self, unit: Tensor, queries: Tensor, key_line: Tensor, block: Tensor) -> Tensor:
        """The largest product of a unit's queries with the keys of each block, ``(U, keep)``."""
        run, device = self.run, block.device
        address = (key_line[:, None] * self.m + block * self.side)[..., None] // run
        address = address + torch.arange(self.side // run, device=device)
        # A last block that sticks out reads what is hidden below.
        keys = self.k.index_select(0, address.flatten().clamp(max=len(self.k) - 1))
        keys = keys.to(queries.dtype).view(len(unit), -1, queries.shape[-1])
        best = (queries @ keys.mT).amax(1).view(*block.shape, self.side)
        place = block[..., None] * self.side + torch.arange(self.side, device=device)
        hidden = (place < self.first[unit, None, None]) | (place >= self.end[unit, None, None])
        # Keys that are no numbers lose, so that a choice can be made among the others.
        return best.masked_fill_(hidden | best.isnan(), -torch.inf).amax(-1)


def _best(scores: Tensor, real: Tensor, keep: int) -> Tensor:
    """Places, in ``scores.flatten()``, of the ``keep`` best real entries of each row, in order; of
    equal ones the first. An entry that is not real counts as -inf, and a row has ``keep`` real ones."""
    scores = scores.masked_fill(~real, -torch.inf)
    # Unsorted, the largest come at less than half the price.
    edge = scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    best = (scores >= edge) & real
    if best.sum() > keep * len(scores):
        above = scores > edge
        tied = best & ~above
        best = above | (tied & (tied.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))
    return best.flatten().nonzero()[:, 0]


def _odd_rows(n: int, block_q: int, device: torch.device) -> Tensor:
    """Rows 1, 3, 5, ... of each query block, ``(nq, max(1, block_q // 2))``; the only row of a block
    that has one. A short last block repeats its last odd row, which changes no maximum."""
    start = torch.arange(0, n, block_q, device=device)[:, None]
    held = (n - start).clamp(max=block_q)
    odd = 2 * torch.arange(max(1, block_q // 2), device=device) + 1
    return start + torch.minimum(odd, (held // 2 * 2 - 1).clamp(min=0))
