"""BlockLayout: which key blocks each query block reads. The common currency of all sparsity."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .mask import Mask

# A head or batch index that goes along with positions.
Index: TypeAlias = Tensor | int

# Pairs evaluated at once: 8 MB of int64 positions.
_STRIP = 1 << 20


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """For each (batch, head, query block) the ascending list of key blocks to read.

    A pair is allowed when its key block is listed and ``mask`` (if any) allows it. ``partial`` says
    which listed blocks need the mask evaluated inside; the others are allowed entirely.

    Attributes:
        n, m: numbers of queries and keys. Query row ``r`` is position ``r + m - n``.
        block_q, block_k: block sides; the last block of either axis may be short.
        index: int64 ``(Bl, Hl, nq, K)``, ids of key blocks, padded at the end with -1.
            ``Bl`` is 1 or the batch size, ``Hl`` is 1, the number of key heads or of query heads.
        partial: bool, the shape of ``index``.
        mask: the mask that the ``partial`` flags belong to, ``None`` where nothing is masked inside.
        perm_q, perm_k: optional int64 ``(1 or Bl, 1 or Hl, n)`` and ``(1 or Bl, 1 or Hl, m)``:
            blocks count slots, and slot ``s`` holds row ``perm[s]``. The mask is always judged on
            original positions.
    """

    n: int
    m: int
    block_q: int
    block_k: int
    index: Tensor
    partial: Tensor
    mask: Mask | None = None
    perm_q: Tensor | None = None
    perm_k: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"BlockLayout: block sides must be >= 1, got {self.block}")
        if self.index.dim() != 4 or self.index.shape[2] != self.query_blocks:
            raise ValueError(
                f"BlockLayout: index must be (Bl, Hl, {self.query_blocks}, K) for {self.n} queries in "
                f"blocks of {self.block_q}, got {tuple(self.index.shape)}"
            )
        if self.partial.shape != self.index.shape:
            raise ValueError(
                f"BlockLayout: partial has shape {tuple(self.partial.shape)}, "
                f"index {tuple(self.index.shape)}"
            )
        for name, perm, length in (
            ("perm_q", self.perm_q, self.n),
            ("perm_k", self.perm_k, self.m),
        ):
            if perm is None:
                continue
            fits = perm.dim() == 3 and perm.shape[-1] == length
            if not fits or any(
                p not in (1, x) for p, x in zip(perm.shape[:2], self.index.shape[:2], strict=True)
            ):
                bl, hl = self.index.shape[:2]
                raise ValueError(
                    f"BlockLayout: {name} must be (1 or {bl}, 1 or {hl}, {length}), "
                    f"got {tuple(perm.shape)}"
                )

    @property
    def block(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    @property
    def query_blocks(self) -> int:
        return -(-self.n // self.block_q)

    @property
    def key_blocks(self) -> int:
        return -(-self.m // self.block_k)

    @property
    def permuted(self) -> bool:
        return self.perm_q is not None or self.perm_k is not None

    @property
    def perms(self) -> tuple[Tensor | None, Tensor | None]:
        return self.perm_q, self.perm_k

    @property
    def counts(self) -> Tensor:
        """Listed key blocks of each query block, int64 ``(Bl, Hl, nq)``."""
        return (self.index >= 0).sum(-1)

    @property
    def density(self) -> float:
        """Work in the layout over work in the dense call: listed pairs / (n * m)."""
        if "density" not in self.memo:
            pairs = self.n * self.m * self.index.shape[0] * self.index.shape[1]
            self.memo["density"] = self.listed_pairs() / pairs if pairs else 0.0
        found: float = self.memo["density"]
        return found

    def listed_pairs(self) -> int:
        """Pairs inside listed blocks, masked or not, summed over the layout's batch and heads."""
        rows = self._sizes(self.n, self.block_q).to(self.index.device)
        cols = self._sizes(self.m, self.block_k).to(self.index.device)
        wide = torch.where(self.index >= 0, cols[self.index.clamp(min=0)], 0).sum(-1)
        return int((wide * rows).sum())

    def allowed_pairs(self) -> int:
        """Pairs that are really allowed, summed over the layout's batch and heads. Exact."""
        if self.mask is None:
            return self.listed_pairs()
        at = self.partial.nonzero()
        kept, none = self.index.masked_fill(self.partial, -1), torch.zeros_like(self.partial)
        whole = BlockLayout(self.n, self.m, self.block_q, self.block_k, kept, none)
        total = whole.listed_pairs()
        for chunk in at.split(max(1, _STRIP // (self.block_q * self.block_k))):
            total += int(self.tile_mask(*chunk.unbind(-1)).sum())
        return total

    @staticmethod
    def _sizes(length: int, block: int) -> Tensor:
        starts = torch.arange(0, max(length, 1), block)
        return (length - starts).clamp(max=block)

    def positions(self, b: Tensor, h: Tensor, block: Tensor, *, keys: bool) -> Tensor:
        """Absolute positions ``(P, side)`` of query or key blocks; -1 past the end of the axis.

        Args:
            b, h: batch and head index into the layout, ``(P,)``.
            block: block ids ``(P,)``.
            keys: whether ``block`` counts key blocks.
        """
        side, length = (self.block_k, self.m) if keys else (self.block_q, self.n)
        perm = self.perm_k if keys else self.perm_q
        slot = block[:, None] * side + torch.arange(side, device=block.device)
        inside = slot < length
        slot = slot.clamp(max=length - 1)
        if perm is not None:
            pb, ph = (x if size > 1 else x * 0 for x, size in zip((b, h), perm.shape, strict=False))
            slot = perm.to(block.device)[pb[:, None], ph[:, None], slot]
        if not keys:
            slot = slot + self.m - self.n
        return torch.where(inside, slot, -(self.n + self.m) - 1)

    def tile_mask(self, b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        """Allowed pairs inside listed blocks, bool ``(P, block_q, block_k)``.

        Args:
            b, h, row, slot: indices into ``index``, each ``(P,)``.
        """
        block = self.index[b, h, row, slot]
        i = self.positions(b, h, row, keys=False)[:, :, None]
        j = self.positions(b, h, block, keys=True)[:, None, :]
        outside = -(self.n + self.m) - 1
        real = (i != outside) & (j != outside)
        if self.mask is None:
            return real
        i, j = i.clamp(min=self.m - self.n), j.clamp(min=0)
        return self.mask.allows(i, j, h[:, None, None], b[:, None, None]) & real

    def under(self, mask: Mask) -> BlockLayout:
        """The same blocks with ``mask`` applied inside, blocks that it empties dropped."""
        if self.mask == mask:
            return self
        joint = mask if self.mask is None else self.mask & mask
        index = self.index
        sizes = zip((joint.batch, joint.heads), index.shape, strict=False)
        shape = (*(have if own is None else own for own, have in sizes), *index.shape[2:])
        for what, have, want in zip(("batch", "heads"), index.shape, shape, strict=False):
            if have not in (1, want):
                raise ValueError(f"layout: made for {what}={have}, but its mask for {want}")
        index = index.expand(shape)
        listed = index >= 0
        if self.permuted:
            some, every = listed, torch.zeros_like(listed)
        else:
            some, every = self._bounds(joint, index)
            some = some & listed
        kept = torch.where(some, index, -1)
        order = torch.argsort((~some).to(torch.int8), dim=-1, stable=True)
        kept = kept.gather(-1, order)
        flags = (some & ~every).gather(-1, order)
        width = int((kept >= 0).sum(-1).max()) if kept.numel() else 0
        kept, flags = (x[..., :width].contiguous() for x in (kept, flags))
        return replace(self, index=kept, partial=flags, mask=joint, memo={})

    def _bounds(self, mask: Mask, index: Tensor) -> tuple[Tensor, Tensor]:
        device, offset = index.device, self.m - self.n
        rows = torch.arange(self.query_blocks, device=device)[:, None] * self.block_q
        i0, i1 = rows + offset, (rows + self.block_q).clamp(max=self.n) - 1 + offset
        j0 = index.clamp(min=0) * self.block_k
        j1 = (j0 + self.block_k).clamp(max=self.m) - 1
        h = torch.arange(index.shape[1], device=device).view(1, -1, 1, 1)
        b = torch.arange(index.shape[0], device=device).view(-1, 1, 1, 1)
        some, every = mask.tile(i0, i1, j0, j1, h, b)
        return some.expand(index.shape), every.expand(index.shape)

    def dense(self) -> Tensor:
        """What this layout allows, as a bool tensor ``(Bl, Hl, n, m)``. Quadratic: for tests."""
        bl, hl, nq, _ = self.index.shape
        bq, bk, nk = self.block_q, self.block_k, self.key_blocks
        out = self.index.new_zeros((bl, hl, nq, nk, bq, bk), dtype=torch.bool)
        at = (self.index >= 0).nonzero()
        b, h, row, slot = at.unbind(-1)
        tiles = self.tile_mask(b, h, row, slot)
        whole = BlockLayout(self.n, self.m, bq, bk, self.index, self.partial, None, *self.perms)
        full = ~self.partial[b, h, row, slot]
        tiles[full] = whole.tile_mask(b[full], h[full], row[full], slot[full])
        out[b, h, row, self.index[b, h, row, slot]] = tiles
        out = out.permute(0, 1, 2, 4, 3, 5).reshape(bl, hl, nq * bq, nk * bk)
        out = out[:, :, : self.n, : self.m]
        for axis, perm in ((2, self.perm_q), (3, self.perm_k)):
            if perm is not None:
                inverse = torch.argsort(perm, dim=-1)
                out = out.gather(axis, inverse.unsqueeze(5 - axis).expand(out.shape))
        return out.contiguous()

    def to(self, device: Any) -> BlockLayout:
        """The same layout on another device (itself when it is there already)."""
        if self.index.device == torch.device(device):
            return self
        perm_q, perm_k = (None if p is None else p.to(device) for p in self.perms)
        index, partial = self.index.to(device), self.partial.to(device)
        return replace(self, index=index, partial=partial, perm_q=perm_q, perm_k=perm_k, memo={})

    @classmethod
    def from_index(
        cls,
        index: Tensor,
        n: int,
        m: int,
        block: int | tuple[int, int],
        mask: Mask | None = None,
        *,
        perm_q: Tensor | None = None,
        perm_k: Tensor | None = None,
    ) -> BlockLayout:
        """A layout from lists of key blocks in any order, padded with -1.

        Args:
            index: integers ``(Bl, Hl, nq, K)``. Repeated ids are counted once.
            mask: applied inside the blocks; those that it empties are dropped.

        Raises:
            ValueError: an id is outside ``[-1, key_blocks)`` or a shape does not fit.
        """
        bq, bk = (block, block) if isinstance(block, int) else block
        nk = -(-m // bk)
        index = index.to(torch.int64)
        if index.numel() and (int(index.max()) >= nk or int(index.min()) < -1):
            raise ValueError(
                f"BlockLayout: key block ids must lie in [-1, {nk}), got "
                f"{int(index.min())} to {int(index.max())}"
            )
        index = torch.where(index < 0, nk, index).sort(dim=-1).values
        again = torch.zeros_like(index, dtype=torch.bool)
        again[..., 1:] = index[..., 1:] == index[..., :-1]
        index = torch.where(again, nk, index).sort(dim=-1).values
        width = int((index < nk).sum(-1).max()) if index.numel() else 0
        index = torch.where(index == nk, -1, index)[..., :width].contiguous()
        plain = cls(
            n, m, bq, bk, index, torch.zeros_like(index, dtype=torch.bool), None, perm_q, perm_k
        )
        return plain if mask is None else plain.under(mask)
