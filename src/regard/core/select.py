"""Selectors: which key blocks to read, chosen from the content of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attend import attend
from .layout import BlockLayout, head_batch_index, pack_lists
from .masks import Causal, Mask


class Selector:
    """Chooses key blocks from the content. Subclasses are frozen dataclasses with their knobs.

    A selector is causal by construction: what it returns carries the mask. It keeps nothing about
    a running sequence; that lives in the state object of :meth:`new_state`.
    """

    def new_state(self) -> Any:
        """What decoding keeps for one layer and one cache; ``None`` where nothing is kept."""
        return None

    def select(
        self, q: Tensor, k: Tensor, *, mask: Mask | None = None, state: Any = None
    ) -> BlockLayout:
        """The key blocks to read.

        Args:
            q: queries ``(B, H, N, D)``, the last ``N`` of ``M`` positions.
            k: keys ``(B, Hkv, M, D)``.
            mask: where a query may look, by default :class:`~regard.core.masks.Causal`.
            state: from :meth:`new_state`, handed in again at every step over the same cache.

        Returns:
            A layout with ``mask`` inside, for :func:`regard.attend`.
        """
        raise NotImplementedError


def block_allowed(
    mask: Mask | None, n: int, m: int, block: int | tuple[int, int], device: Any = None
) -> Tensor:
    """Whether any pair of a query block and a key block may be allowed, ``(Bl, Hl, nq, nk)``.

    Judged by the mask's bounds for rectangles: True for some empty blocks of masks without a
    closed form, never False for a block that holds an allowed pair.

    Args:
        mask: ``None`` means causal.
        n, m: numbers of queries and keys.
        block: block side, or ``(block_q, block_k)``.
    """
    mask = Causal() if mask is None else mask
    bq, bk = (block, block) if isinstance(block, int) else block
    nq, nk = -(-n // bq), -(-m // bk)
    h, b = head_batch_index(mask, device)
    i0 = torch.arange(nq, device=device)[:, None] * bq + m - n
    i1 = (i0 + bq).clamp(max=m) - 1
    j0 = torch.arange(nk, device=device)[None, :] * bk
    j1 = (j0 + bk).clamp(max=m) - 1
    some: Tensor = mask.tile(i0, i1, j0, j1, h, b)[0]
    batch, heads = (1 if x is None else x for x in (mask.batch, mask.heads))
    return some.expand(batch, heads, nq, nk)


def narrow(allowed: Tensor, heads: int) -> Tensor:
    """``allowed`` ``(Bl, Hl, nq, nk)`` for ``heads`` groups of heads: what any of a group may see.

    Raises:
        ValueError: ``heads`` does not divide ``Hl``, and ``Hl`` is not 1.
    """
    if allowed.shape[1] in (1, heads):
        return allowed
    if allowed.shape[1] % heads:
        raise ValueError(
            f"choose_blocks: allowed has {allowed.shape[1]} heads, which the {heads} heads of "
            "scores do not divide"
        )
    groups = allowed.reshape(allowed.shape[0], heads, -1, *allowed.shape[2:])
    return groups.any(2)


def choose_blocks(
    scores: Tensor,
    allowed: Tensor,
    keep: int | Tensor,
    *,
    sinks: int = 0,
    recent: int = 0,
    prefer: str = "early",
) -> Tensor:
    """The best allowed key blocks of each query block.

    Blocks that are not allowed are out before the choice, and a row with fewer than ``keep``
    allowed blocks takes them all. Forced blocks count towards ``keep``, but none of them is dropped
    when they are more.

    Args:
        scores: ``(B, Hs, nq, nk)``, larger is better.
        allowed: bool ``(1 or B, Hl, nq, nk)``. Where it has ``G`` times the heads of ``scores``, a
            group of ``G`` shares its choice, and a block counts as allowed if any of them may see it.
        keep: blocks to keep, an integer or integers that broadcast to ``(B, Hs, nq)``.
        sinks: how many of the first blocks are always kept.
        recent: how many of the last allowed blocks are always kept.
        prefer: which of equal scores wins, the ``"early"`` or the ``"late"`` block.

    Returns:
        bool ``(B, Hs, nq, nk)``.
    """
    if prefer not in ("early", "late"):
        raise ValueError(f"choose_blocks: prefer must be 'early' or 'late', got {prefer!r}")
    nk = scores.shape[-1]
    allowed = narrow(allowed, scores.shape[1]).to(scores.device).expand(scores.shape)
    if nk == 0:
        return allowed.clone()
    forced = torch.zeros_like(allowed)
    forced[..., :sinks] = allowed[..., :sinks]
    if recent:
        forced |= allowed & (allowed.flip(-1).cumsum(-1).flip(-1) <= recent)
    worth = scores.masked_fill(~allowed, -torch.inf).masked_fill(forced, torch.inf)
    count = torch.as_tensor(keep, device=scores.device).expand(scores.shape[:-1])
    count = torch.maximum(count, forced.sum(-1)).clamp(max=nk)[..., None]
    edge = _kth_best(worth, count)
    above = worth > edge
    tied = (worth == edge) & allowed
    order = tied.cumsum(-1) if prefer == "early" else tied.flip(-1).cumsum(-1).flip(-1)
    return (above | (tied & (order <= count - above.sum(-1, keepdim=True)))) & (count > 0)


def _kth_best(worth: Tensor, count: Tensor) -> Tensor:
    """The ``count``-th largest of each row, ``(..., 1)``; the largest where ``count`` is 0."""
    least, most = (int(x) for x in count.aminmax()) if count.numel() else (1, 1)
    if least == most:
        # Unsorted, this takes less than half the time.
        return worth.topk(max(1, most), dim=-1, sorted=False).values.amin(-1, keepdim=True)
    best = worth.topk(max(1, most), dim=-1).values
    return best.gather(-1, (count - 1).clamp(min=0))


def chosen_layout(
    chosen: Tensor,
    n: int,
    m: int,
    block: int | tuple[int, int],
    mask: Mask | None = None,
    *,
    perm_q: Tensor | None = None,
    perm_k: Tensor | None = None,
) -> BlockLayout:
    """The layout that lists the chosen blocks, ``mask`` (``None`` means causal) applied inside.

    Args:
        chosen: bool ``(Bl, Hl, nq, nk)``.
    """
    bq, bk = (block, block) if isinstance(block, int) else block
    bl, hl, nq, nk = chosen.shape
    line, key = chosen.reshape(-1, nk).nonzero().unbind(-1)
    index, width = pack_lists(line, key, bl * hl * nq)
    index = index.view(bl, hl, nq, width)
    plain = torch.zeros_like(index, dtype=torch.bool)
    # One short query block, as in decoding, is not computed as a whole one.
    side = max(1, min(bq, n))
    mask = Causal() if mask is None else mask
    if n == 1 and isinstance(mask, Causal):  # the last row sees every key
        return BlockLayout(n, m, side, bk, index, plain, mask, perm_q, perm_k)
    layout = BlockLayout(n, m, side, bk, index, plain, None, perm_q, perm_k)
    return layout.under(mask)


class Summaries:
    """Summaries of key blocks, kept up to date as keys are appended.

    Args:
        block: keys a block.
        reduce: turns ``(B, Hkv, blocks, keys, D)`` into ``(B, Hkv, blocks, Ds)``. Unfinished last
            blocks come alone, with the keys that they have.
    """

    def __init__(self, block: int, reduce: Callable[[Tensor], Tensor]) -> None:
        self.block, self.reduce = block, reduce
        self._done: Tensor | None = None

    def update(self, k: Tensor) -> Tensor:
        """Summaries ``(B, Hkv, ceil(M / block), Ds)`` of all blocks of ``k`` ``(B, Hkv, M, D)``.

        Only blocks finished since the last call are computed, and the unfinished one. A shorter
        ``k``, or one of another batch, starts afresh.
        """
        whole = k.shape[2] // self.block
        done = self._done
        if done is not None and (done.shape[:2] != k.shape[:2] or done.shape[2] > whole):
            done = None
        have = 0 if done is None else done.shape[2]
        if done is None or have < whole:
            new = k[:, :, have * self.block : whole * self.block]
            new = self.reduce(new.unflatten(2, (whole - have, self.block)))
            done = new if done is None else torch.cat([done, new], dim=2)
            self._done = done
        tail = k[:, :, whole * self.block :]
        if tail.shape[2] == 0:
            return done
        return torch.cat([done, self.reduce(tail[:, :, None])], dim=2)


def recall(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Tensor:
    """Share of the true attention mass that a layout keeps, ``(B, H, N)``, between 0 and 1.

    It is ``exp(lse_layout - lse_dense)``, so that nothing quadratic is held. Rows that may see
    nothing have recall 1.

    Args:
        q, k: as for :func:`regard.attend`.
        layout: what was selected, its mask included.
        mask: of the dense attention, by default causal.
        scale: factor on the scores, default ``D ** -0.5``.
    """
    # Only the log-sum-exp is wanted, so the values are as narrow as can be.
    v = k[..., :1]
    dense = Causal() if mask is None else mask
    _, kept = attend(q, k, v, layout=layout, scale=scale, return_lse=True)
    _, whole = attend(q, k, v, mask=dense, scale=scale, return_lse=True)
    return torch.where(whole == -torch.inf, 1.0, (kept - whole).exp()).clamp(max=1.0)
