"""The mask of S2-Attention (arXiv 2407.17678); its functions are in :mod:`regard.patterns.s2`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core.layout import Index
from regard.core.masks import Mask

_SIZES = (
    ("query_heads", 1),
    ("block", 1),
    ("vert_stride", 1),
    ("kv_heads", 1),
    ("dense_heads", 0),
    ("offset", None),
    ("step", 0),
)


@dataclass(frozen=True)
class S2(Mask):
    """Sparsely-sharded attention; arguments as :func:`regard.patterns.s2.s2_mask`.

    Omitted arguments are filled in: `local_blocks` becomes `(left, right)`, `step` a number.
    """

    query_heads: int
    block: int = 64
    local_blocks: int | tuple[int, int] = 16
    vert_stride: int = 8
    kv_heads: int | None = None
    dense_heads: int = 0
    offset: int = 0
    homo: bool = False
    causal: bool = True
    vert_positions: Literal["absolute", "relative"] | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        fill = object.__setattr__
        if self.kv_heads is None:
            fill(self, "kv_heads", self.query_heads)
        if self.vert_positions is None:
            fill(self, "vert_positions", "absolute" if self.causal else "relative")
        if self.vert_positions not in ("absolute", "relative"):
            raise ValueError(
                "s2_mask: vert_positions must be 'absolute' or 'relative', got "
                f"{self.vert_positions!r}"
            )
        for name, least in _SIZES:
            value = getattr(self, name)
            if name == "step" and value is None:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or (least is not None and value < least):
                bound = "" if least is None else f" >= {least}"
                raise ValueError(f"s2_mask: {name} must be an integer{bound}, got {value!r}")
        if self.step is None:
            # A homogeneous pattern counts as one head; its step is never used.
            fill(self, "step", max(1, self.vert_stride // (1 if self.homo else self.query_heads)))
        self._check_heads()
        fill(self, "local_blocks", self._window())

    def _check_heads(self) -> None:
        if self.query_heads % self.shards:
            raise ValueError(
                f"s2_mask: kv_heads={self.shards} does not divide heads={self.query_heads}"
            )
        if self.dense_heads > self.shards:
            raise ValueError(
                f"s2_mask: dense_heads={self.dense_heads}, but there are {self.shards} key heads"
            )
        if self.homo and self.dense_heads:
            raise ValueError(
                f"s2_mask: homo has one pattern for all heads, but dense_heads={self.dense_heads}"
            )

    def _window(self) -> tuple[int, int]:
        local = self.local_blocks
        sides = local if isinstance(local, tuple) else (local, 1 if self.causal else local)
        least = 0 if self.vert_stride == 1 else 1
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in sides)
        if len(sides) != 2 or not whole or min(sides) < least:
            raise ValueError(
                f"s2_mask: local_blocks must be an integer >= 1 or two of them, got {local!r}"
            )
        if self.causal and sides[1] > 1:
            raise ValueError(f"s2_mask: a causal window has nothing to the right, got {local!r}")
        return sides

    @property
    def shards(self) -> int:
        """`Hk`, the number of key heads."""
        assert self.kv_heads is not None
        return self.kv_heads

    @property
    def left(self) -> int:
        """Local blocks to the left, the query's own included."""
        assert isinstance(self.local_blocks, tuple)
        return self.local_blocks[0]

    @property
    def right(self) -> int:
        """Local blocks to the right, the query's own included."""
        assert isinstance(self.local_blocks, tuple)
        return self.local_blocks[1]

    @property
    def heads(self) -> int | None:
        one = self.homo or (self.vert_positions == "relative" and self.dense_heads == 0)
        return None if one else self.query_heads

    closed = True
    constant = True

    @property
    def missing(self) -> tuple[int, ...]:
        """Residues modulo `vert_stride` of key blocks that no head sees beyond its window.

        Empty for patterns that do not shard by design (homogeneous and relative ones).
        """
        if self.homo or self.vert_positions == "relative" or self.dense_heads:
            return ()
        assert self.step is not None
        seen = {-(h * self.step + self.offset) % self.vert_stride for h in range(self.shards)}
        return tuple(sorted(set(range(self.vert_stride)) - seen))

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if heads is not None and heads != self.query_heads and not self.homo:
            raise ValueError(f"S2: made for {self.query_heads} heads, but the call has {heads}")
        if n > m:
            raise ValueError(
                f"S2: needs as many keys as queries at least, got {n} queries and {m} keys"
            )

    def sharded(self, b: Tensor, h: Index) -> Tensor:
        """Whether key block `b` is in the shard of key head `h` (or the head is dense)."""
        assert self.step is not None
        own = (b + h * self.step + self.offset) % self.vert_stride == 0
        return own | (h >= self.shards - self.dense_heads)

    def keeps(self, a: Tensor, b: Tensor, h: Index = 0) -> Tensor:
        """The pattern of blocks: whether query block `a` reads key block `b` in key head `h`."""
        d = a - b
        if self.vert_positions == "relative":
            beyond = (d - self.left + 1).clamp(min=0) + (1 - self.right - d).clamp(min=0)
            dense = h >= self.shards - self.dense_heads
            keep = (beyond % self.vert_stride == 0) | dense
        else:
            keep = ((d < self.left) & (-d < self.right)) | self.sharded(b, h)
        return keep & (d >= 0) if self.causal else keep

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        keep = self.keeps(i // self.block, j // self.block, self._key_head(h))
        return keep & (j <= i) if self.causal else keep

    def _key_head(self, h: Index) -> Index:
        return 0 if self.heads is None else h // (self.query_heads // self.shards)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Exact for every rectangle, aligned to the blocks or not."""
        c, v, kv = self.block, self.vert_stride, self._key_head(h)
        a0, a1, b0, b1 = i0 // c, i1 // c, j0 // c, j1 // c
        # Distances of block pairs: all integers from low to high.
        low, high = a0 - b1, a1 - b0
        if self.causal:
            low = low.clamp(min=0)
            b1 = torch.minimum(b1, a1)
        dense = kv >= self.shards - self.dense_heads
        local = (low < self.left) & (high > -self.right)
        if self.vert_positions == "relative":
            past = _multiples(low.clamp(min=self.left) - self.left + 1, high - self.left + 1, v)
            ahead = _multiples(
                (-high).clamp(min=self.right) - self.right + 1, -low - self.right + 1, v
            )
            some, every = local | past[0] | ahead[0], past[1] & ahead[1]
        else:
            first = b0 + (-(b0 + kv * self.step + self.offset)) % v  # type: ignore[operator]
            some = local | (first <= b1)
            # Key blocks outside the window of some query block, before it or after it.
            before = torch.minimum(b1, a1 - self.left)
            after = torch.maximum(b0, a0 + self.right)
            every = self._shard(b0, before, kv)
            if not self.causal:
                every = every & self._shard(after, b1, kv)
        some, every = some | dense, every | dense
        return (some & (j0 <= i1), every & (j1 <= i0)) if self.causal else (some, every)

    def _shard(self, first: Tensor, last: Tensor, kv: Index) -> Tensor:
        """Whether all key blocks from first to last (perhaps none) are in a head's shard."""
        if self.vert_stride == 1:
            return torch.ones_like(first, dtype=torch.bool)
        return (last < first) | ((last == first) & self.sharded(first, kv))


def _multiples(low: Tensor, high: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """Whether some, and whether all, integers from low to high are multiples of v; none: all."""
    empty = low > high
    some = ~empty & (torch.div(high, v, rounding_mode="floor") * v >= low)
    if v == 1:
        return some, torch.ones_like(some)
    return some, empty | ((low == high) & some)
