"""Selectors that every comparison needs: the exact best blocks, block summaries, plain streaming,
vertical and slash lines.

None belongs to one paper; each bounds or explains the published ones. All of them choose key blocks
of one size for query blocks of the same size, keep the first ``sinks`` and the last ``recent`` blocks,
and share the choice among the query heads of a key head unless told otherwise: a shared list is
gathered once for the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.layout import BlockLayout
from ..core.masks import Causal, Mask
from ..core.select import (
    Selector,
    Summaries,
    block_allowed,
    choose_blocks,
    chosen_layout,
    narrow,
)
from ..core.token_select import key_mass


def share_heads(scores: Tensor, kv_heads: int, share: str) -> Tensor:
    """Scores ``(B, H, nq, nk)`` summed over the heads that share a choice."""
    if share == "head":
        return scores
    if share == "all":
        return scores.sum(1, keepdim=True)
    return scores.unflatten(1, (kv_heads, -1)).sum(2)


def grouped_product(q: Tensor, right: Tensor) -> Tensor:
    """``q @ right`` for ``q`` ``(B, H, N, D)`` and ``right`` ``(B, Hkv, D, S)``, ``(B, H, N, S)``:
    the heads of a group stand below each other, so that ``right`` is not copied for each."""
    b, h, n, d = q.shape
    hkv = right.shape[1]
    rows = q.reshape(b, hkv, h // hkv * n, d)
    return (rows @ right).view(b, h, n, right.shape[-1])


def block_mass(
    q: Tensor, k: Tensor, block: int | tuple[int, int], mask: Mask | None = None
) -> Tensor:
    """Exact attention mass of every key block for every query block, ``(B, H, nq, nk)``.

    The weights of the rows of a query block, summed over rows and over the block's keys, made in
    strips of rows: quadratic time, ``O(N M / block^2)`` memory.

    Args:
        q, k: ``(B, H, N, D)`` and ``(B, Hkv, M, D)``.
        block: tokens a block, or queries and keys a block.
        mask: where a query may look, by default causal.
    """
    b, h, n, _ = q.shape
    side, block = (block, block) if isinstance(block, int) else block
    out = q.new_zeros(b, h, -(-n // side), -(-k.shape[2] // block))
    first = 0
    for mass, _ in key_mass(q, k, mask=mask, block=block):
        rows = torch.arange(first, first + mass.shape[2], device=q.device) // side
        out.index_add_(2, rows, mass.to(out.dtype))
        first += mass.shape[2]
    return out


@dataclass(frozen=True)
class _Blocks(Selector):
    """What the generic selectors have in common.

    Attributes:
        keep: key blocks a query block, forced ones included.
        block: keys a block.
        block_q: queries that share a choice, by default as many as keys in a block; fewer queries
            than that choose one by one.
        sinks, recent: first and last blocks that are always read.
        share: heads that share a choice: ``"kv"`` (those of a key head), ``"head"`` (none), ``"all"``.
    """

    keep: int = 16
    block: int = 64
    block_q: int | None = field(default=None, kw_only=True)
    sinks: int = field(default=1, kw_only=True)
    recent: int = field(default=2, kw_only=True)
    share: str = field(default="kv", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("keep", "block", "block_q"):
            value = getattr(self, name)
            if value is None and name == "block_q":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be an integer >= 1, got {value!r}"
                )
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(
                f"{type(self).__name__}: sinks must be >= 0 and recent >= 1 (a query's own block), "
                f"got {self.sinks} and {self.recent}"
            )
        if self.share not in ("kv", "head", "all"):
            raise ValueError(
                f"{type(self).__name__}: share must be 'kv', 'head' or 'all', got {self.share!r}"
            )

    def sides(self, n: int) -> tuple[int, int]:
        """Queries and keys a block, for ``n`` queries. Fewer than fill a block, such as a question
        after a long prompt, each choose for themselves: it costs little, and they differ."""
        side = self.block if self.block_q is None else self.block_q
        return side if n >= side else 1, self.block

    def scores(
        self, q: Tensor, k: Tensor, allowed: Tensor, mask: Mask, state: Summaries | None
    ) -> Tensor:
        """How much each query block wants each key block, ``(B, H, nq, nk)``."""
        raise NotImplementedError

    def select(
        self, q: Tensor, k: Tensor, *, mask: Mask | None = None, state: Summaries | None = None
    ) -> BlockLayout:
        """The best ``keep`` blocks of every query block; see :class:`~regard.core.select.Selector`."""
        mask = Causal() if mask is None else mask
        n, m = q.shape[2], k.shape[2]
        sides = self.sides(n)
        allowed = block_allowed(mask, n, m, sides, q.device)
        return chosen_layout(self.chosen(q, k, mask, state, allowed), n, m, sides, mask)

    def chosen(
        self, q: Tensor, k: Tensor, mask: Mask, state: Summaries | None, allowed: Tensor
    ) -> Tensor:
        """The blocks to read, bool ``(B, Hs, nq, nk)``."""
        scores = share_heads(self.scores(q, k, allowed, mask, state), k.shape[1], self.share)
        return choose_blocks(scores, allowed, self.keep, sinks=self.sinks, recent=self.recent)


@dataclass(frozen=True)
class ExactTopK(_Blocks):
    """The blocks with the most attention mass: the oracle that bounds every block selector.

    It makes all scores, so that it saves nothing; it tells what can be kept at a density.
    """

    def scores(
        self, q: Tensor, k: Tensor, allowed: Tensor, mask: Mask, state: Summaries | None
    ) -> Tensor:
        """The true mass of the blocks."""
        return block_mass(q, k, self.sides(q.shape[2]), mask)


def _pool_rows(q: Tensor, block: int) -> Tensor:
    """Means of query blocks, ``(B, H, nq, D)``; the last block may be short."""
    n = q.shape[2]
    whole = n // block * block
    parts = [q[:, :, :whole].unflatten(2, (n // block, block)).mean(3)]
    if whole < n:
        parts.append(q[:, :, whole:].mean(2, keepdim=True))
    return torch.cat(parts, dim=2)


def _mean(blocks: Tensor) -> Tensor:
    return blocks.mean(3)


def _bounds(blocks: Tensor) -> Tensor:
    return torch.cat([blocks.amin(3), blocks.amax(3)], dim=-1)


@dataclass(frozen=True)
class BlockTopK(_Blocks):
    """The blocks whose summary the pooled query likes best.

    Attributes:
        summary: ``"mean"`` compares mean query and mean key of the blocks. ``"bounds"`` takes, per
            channel, the larger product with the block's smallest and largest key: for one query an
            upper bound of its scores in the block (Quest, arXiv 2406.10774, Eq. 1).
    """

    summary: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary not in ("mean", "bounds"):
            raise ValueError(f"BlockTopK: summary must be 'mean' or 'bounds', got {self.summary!r}")

    def new_state(self) -> Summaries:
        """Summaries of the key blocks, added to as blocks fill up."""
        return Summaries(self.block, _mean if self.summary == "mean" else _bounds)

    def scores(
        self, q: Tensor, k: Tensor, allowed: Tensor, mask: Mask, state: Summaries | None
    ) -> Tensor:
        """Products of pooled queries and summaries, as shares of one softmax a row, so that heads
        of different temper can be added up."""
        keys = (self.new_state() if state is None else state).update(k)
        pooled = _pool_rows(q, self.sides(q.shape[2])[0]) * q.shape[-1] ** -0.5
        if self.summary == "bounds":
            pooled = torch.cat([pooled.clamp(max=0), pooled.clamp(min=0)], dim=-1)
        raw = grouped_product(pooled, keys.mT)
        return raw.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


@dataclass(frozen=True)
class Streaming(_Blocks):
    """The first blocks and the last ones, whatever is in them: the baseline of every selector."""

    def scores(
        self, q: Tensor, k: Tensor, allowed: Tensor, mask: Mask, state: Summaries | None
    ) -> Tensor:
        """Later blocks before earlier ones."""
        nq, nk = allowed.shape[-2:]
        order = torch.arange(nk, device=q.device, dtype=q.dtype)
        return order.expand(q.shape[0], q.shape[1], nq, nk)


@dataclass(frozen=True)
class VerticalSlash(_Blocks):
    """Columns and diagonals that the last queries look at (MInference, arXiv 2407.02490, Alg. 2),
    in whole blocks.

    The softmax of the last ``probe`` queries over all keys gives the mass of every column of blocks
    and of every diagonal of blocks. Half of ``keep`` goes to the best columns, the rest to the best
    diagonals; where they cross, less is read. What an early query reads depends on the last ones,
    though it never sees their values: as published, this is for prefill.

    Attributes:
        probe: rows at the end that are looked at.
    """

    probe: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe < 1:
            raise ValueError(f"VerticalSlash: probe must be >= 1, got {self.probe}")

    def chosen(
        self, q: Tensor, k: Tensor, mask: Mask, state: Summaries | None, allowed: Tensor
    ) -> Tensor:
        """The allowed blocks that lie on a chosen line, forced ones besides."""
        n, m = q.shape[2], k.shape[2]
        nq, nk = allowed.shape[-2:]
        at = torch.arange(nk, device=q.device)
        i = torch.arange(m - min(n, self.probe), m, device=q.device)
        # Lines of the probed rows: block columns, and block diagonals counted from a row's own block.
        own = (torch.arange(1, nq + 1, device=q.device) * self.sides(n)[0]).clamp(max=n) + m - n - 1
        columns, diagonals = self._lines(q, k, i, mask)
        half = self.keep // 2
        column = choose_blocks(columns, columns >= 0, half)
        diagonal = choose_blocks(diagonals, diagonals >= 0, self.keep - half)
        offset = own[:, None] // self.block - at
        diagonal = diagonal.expand(-1, -1, nq, -1)
        on = diagonal.gather(-1, offset.clamp(min=0).expand(diagonal.shape)) & (offset >= 0)
        forced = choose_blocks(
            torch.zeros_like(on, dtype=q.dtype), allowed, 0, sinks=self.sinks, recent=self.recent
        )
        return (column | on | forced) & narrow(allowed, on.shape[1])

    def _lines(self, q: Tensor, k: Tensor, i: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Mass of the last rows, at positions ``i``, on every block column and block diagonal, each
        ``(B, Hs, 1, nk)``."""
        strips = key_mass(q, k, mask=mask, block=self.block, share=self.share, rows=len(i))
        mass = torch.cat([strip for strip, _ in strips], dim=2)
        nk = mass.shape[-1]
        offset = i[:, None] // self.block - torch.arange(nk, device=q.device)
        diagonals = mass.new_zeros(*mass.shape[:2], nk)
        past = (mass * (offset >= 0)).flatten(2)
        diagonals.index_add_(2, offset.clamp(min=0).flatten(), past)
        return mass.sum(2, keepdim=True), diagonals[:, :, None]
