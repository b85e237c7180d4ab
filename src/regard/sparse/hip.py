"""HiP attention: the best key blocks of each query block, found by a tree search.

Lee et al., "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
arXiv 2406.09827 (later versions carry another title). The keys before a window are cut into
`mask_k / block_k` spans of key blocks; every round halves the spans, scores each half by its first
block, and keeps the best half of the halves, until spans are blocks. `log2` of the span length
rounds score `mask_k` keys each, so that the search costs O(N log N) in all. Nothing is trained.

Followed is the authors' code (DeepAuto-AI/hip-attention, `v1_1/attention2_draft.py`, with the
defaults of `v1_0`), in which the first block of a half stands for it; a later revision of the paper
takes the middle token. Two deliberate differences: spans are cut by whole numbers,
`floor(n i / kb)`, where the code's floating point now and then drops the last block (never for `kb`
a power of two), and equal scores are won by the earlier half instead of by the sort's chance.

The choice is one for a query block, so within a block it depends on the block's later rows too;
values are read causally, and no later block has a say. `block_q = 1` is strictly causal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.layout import BlockLayout
from regard.core.masks import Causal, Mask
from regard.core.select import Selector

from .hip_edge import WindowEdge
from .hip_search import tree_search, visible_keys

CARD = Card(
    key="hip",
    title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
    arxiv="2406.09827",
    family="sparse",
    entry="regard.sparse.hip:HiP",
    definition="tests/sparse/test_hip.py::test_keeps_the_blocks_of_the_algorithm",
    oracle="python -m tests.golden tests/golden/data/hip.npz",
    claim="python -m benchmarks.hip --only language",
    cost="python -m benchmarks.hip --only growth",
    note="The first version's algorithm (one stage); the later three-stage scan is not included.",
)


@dataclass
class HipState:
    """What HiP keeps between decoding steps of one layer and one cache: the last search's blocks.

    Args:
        refresh: steps that a search serves; the window moves on all the same. 1 searches at every
            step. A key that leaves the window between two searches is not seen until the next.
    """

    refresh: int = 1
    _kept: Tensor | None = field(default=None, repr=False)
    _length: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        _positive("HipState", "refresh", self.refresh)

    def recall(self, q: Tensor, m: int) -> Tensor | None:
        """Blocks that still serve one row ``q`` ``(B, H, 1, D)`` over ``m`` keys, or ``None``."""
        kept, age = self._kept, m - self._length
        if kept is None or q.shape[2] != 1 or not 0 <= age < self.refresh:
            return None
        return kept if kept.shape[:2] == q.shape[:2] and kept.device == q.device else None

    def keep(self, kept: Tensor | None, m: int) -> None:
        """Remember what a search over ``m`` keys has found; ``None`` where none was needed."""
        self._kept, self._length = kept, m


def hip_blocks(
    q: Tensor,
    k: Tensor,
    *,
    mask_k: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 128,
    mask: Mask | None = None,
    state: HipState | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The key blocks that HiP keeps, and where each query block's window lies.

    Args:
        q: ``(B, H, N, D)``, after the rotary embedding, the last ``N`` of ``M`` positions.
        k: ``(B, Hkv, M, D)``.
        mask_k: keys that are kept, a multiple of ``block_k``. No search is made for query blocks
            with no more than these before their window.
        block_q: queries that share a choice.
        block_k: keys a block.
        window: last visible keys of a query block, which all its rows read; 0 for none.
        mask: where a query may look, ``None`` for causal. The search runs over the stretch of keys
            that holds all a query block may see: ``Full()`` is cross-attention, and padding at the
            left is left out.
        state: of one decoding cache.

    Returns:
        ``blocks`` int64 ``(B, H, nq, min(mask_k / block_k, blocks of keys))``, ascending ids padded
        with -1, and the window's ``start`` and ``end``, int64 ``(1 or B, 1 or H, nq)``.

    Raises:
        ValueError: a size out of range, or ``mask_k`` not a multiple of ``block_k``.
    """
    _check(q, k, mask_k, block_q, block_k, window)
    n, m = q.shape[2], k.shape[2]
    first, end = visible_keys(mask, n, m, block_q, q.device)
    start = torch.maximum(end - window, first)
    count = -(-start // block_k) - first // block_k
    count = torch.where(start > first, count, 0)
    keep = mask_k // block_k
    searching = bool((count > keep).any())
    if state is not None and searching:
        kept = state.recall(q, m)
        if kept is not None:
            return kept, start, end
    with torch.no_grad():
        blocks = tree_search(
            q,
            k,
            first,
            end,
            count,
            keep=min(keep, -(-m // block_k)),
            block_q=block_q,
            block_k=block_k,
        )
    if state is not None:
        state.keep(blocks if searching and n == 1 else None, m)
    return blocks, start, end


def hip_select(
    q: Tensor,
    k: Tensor,
    *,
    mask_k: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 128,
    mask: Mask | None = None,
    state: HipState | None = None,
) -> BlockLayout:
    """The layout of HiP attention: the kept blocks of :func:`hip_blocks`, whose arguments these
    are, and the window, under the mask. One list for each query head."""
    blocks, start, end = hip_blocks(
        q,
        k,
        mask_k=mask_k,
        block_q=block_q,
        block_k=block_k,
        window=window,
        mask=mask,
        state=state,
    )
    n, m = q.shape[2], k.shape[2]
    b, h, nq, _ = blocks.shape
    cut = start // block_k
    wide = int((-(-end // block_k) - cut).max()) if nq else 0
    near = cut[..., None] + torch.arange(wide, device=q.device)
    near = torch.where(near * block_k < end[..., None], near, -1).expand(b, h, nq, wide)
    # The block in which the window begins may have been kept; it is listed once.
    both = (blocks == cut[..., None]).any(-1)
    near = near.masked_fill(both[..., None] & (near == cut[..., None]), -1)
    index = torch.cat([blocks, near], dim=-1)
    # Entries of -1 between the two lists are dropped where the mask is applied.
    plain = torch.zeros_like(index, dtype=torch.bool)
    layout = BlockLayout(n, m, block_q, block_k, index, plain)
    mask = Causal() if mask is None else mask
    if b and bool((start > cut * block_k).any()):
        # The part of that block before the window, where the block was not kept.
        low, high = (cut * block_k).expand(b, h, nq), start.expand(b, h, nq)
        mask = mask & WindowEdge(n, m, block_q, low, torch.where(both, low, high))
    return layout.under(mask)


@dataclass(frozen=True)
class HiP(Selector):
    """HiP attention as a selector, for prefill and decoding; see :func:`hip_blocks`.

        with regard.patch(model, HiP(mask_k=1024), layers=range(3, 30)):
            model.generate(**inputs)

    The authors keep some of the first layers dense: leave them out of ``layers``. Blocks of 64 keys,
    ``HiP(1024, block_q=64, block_k=64)``, choose more coarsely and run fastest on a CPU.

    Attributes:
        mask_k: keys kept by the search, beside the window.
        block_q: queries that share a choice.
        block_k: keys a block.
        window: last keys, read by all rows of a query block.
        refresh: decoding steps that a search serves, see :class:`HipState`.
    """

    mask_k: int = 512
    block_q: int = field(default=32, kw_only=True)
    block_k: int = field(default=2, kw_only=True)
    window: int = field(default=128, kw_only=True)
    refresh: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _check_sizes(self.mask_k, self.block_q, self.block_k, self.window)
        _positive("HiP", "refresh", self.refresh)

    def new_state(self) -> HipState:
        """The last search's blocks, for ``refresh > 1``."""
        return HipState(self.refresh)

    def select(
        self, q: Tensor, k: Tensor, *, mask: Mask | None = None, state: HipState | None = None
    ) -> BlockLayout:
        """The kept blocks and the window of every query block and head.

        Fewer queries than fill a block, such as a question after a long prompt, choose one by one.
        """
        return hip_select(
            q,
            k,
            mask_k=self.mask_k,
            block_q=self.block_q if q.shape[2] >= self.block_q else 1,
            block_k=self.block_k,
            window=self.window,
            mask=mask,
            state=state,
        )


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_k: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 128,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Tensor:
    """Exact softmax over what :func:`hip_select` lists.

    Args:
        q, k, v: as for :func:`regard.attend`.
        mask_k, block_q, block_k, window, mask: as for :func:`hip_blocks`.
        scale: factor on the scores, default ``D ** -0.5``. The search does not depend on it.

    Returns:
        ``(B, H, N, Dv)``. Gradients flow through the attention, not through the choice.
    """
    layout = hip_select(
        q, k, mask_k=mask_k, block_q=block_q, block_k=block_k, window=window, mask=mask
    )
    out: Tensor = attend(q, k, v, layout=layout, scale=scale)
    return out


def _positive(name: str, argument: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {argument} must be an integer >= {least}, got {value!r}")


def _check_sizes(mask_k: int, block_q: int, block_k: int, window: int) -> None:
    sizes = (("mask_k", mask_k, 1), ("block_q", block_q, 1), ("block_k", block_k, 1))
    for argument, value, least in (*sizes, ("window", window, 0)):
        _positive("hip", argument, value, least)
    if mask_k % block_k:
        raise ValueError(f"hip: mask_k must be a multiple of block_k, got {mask_k} and {block_k}")


def _check(q: Tensor, k: Tensor, mask_k: int, block_q: int, block_k: int, window: int) -> None:
    _check_sizes(mask_k, block_q, block_k, window)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            "hip: q and k must be (batch, heads, length, width), got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"hip: k is {tuple(k.shape)}, which does not fit q {tuple(q.shape)}")
