"""What a mask is, and the algebra of masks: ``&``, ``|``, ``~``.

A mask is defined by one function of absolute positions, ``allows(i, j, h, b)``. Everything faster
(dense tensors, block layouts, FlexAttention predicates) is derived from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .layout import BlockLayout, Index, build_layout, head_batch_index

MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Mask:
    """Where a query may look. Subclasses are frozen dataclasses that define :meth:`allows`.

    Positions are absolute: with ``n`` queries and ``m`` keys, query row ``r`` is position
    ``r + m - n``, as in decoding over a cache.
    """

    @property
    def heads(self) -> int | None:
        """How many heads this mask is made for; ``None`` when it is the same for every head."""
        return None

    @property
    def batch(self) -> int | None:
        """How many batch entries this mask is made for; ``None`` when it is the same for all."""
        return None

    @property
    def closed(self) -> bool:
        """Whether :meth:`tile` is tight, so that layouts need not evaluate :meth:`allows`."""
        return False

    @property
    def relative(self) -> bool:
        """Whether :meth:`allows` depends on ``i - j`` alone."""
        return False

    @property
    def constant(self) -> bool:
        """Whether equal masks allow the same pairs for ever, so that layouts may be cached."""
        return False

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        """Whether query position ``i`` may look at key position ``j``.

        Args:
            i, j: int64 tensors of absolute positions, broadcastable against each other.
            h, b: head and batch index, tensors or ints that broadcast along.

        Returns:
            A bool tensor that broadcasts to the joint shape.
        """
        raise NotImplementedError

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Bounds for rectangles of positions with inclusive corners ``[i0, i1] x [j0, j1]``.

        Returns:
            ``(some, every)``: ``some`` is False only where no pair is allowed, ``every`` is True
            only where all are. Between the two a layout marks the block as partial.
        """
        some = torch.ones_like(i0 + j0, dtype=torch.bool)
        return some, torch.zeros_like(some)

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        """Raise ``ValueError`` unless the mask fits ``n`` queries, ``m`` keys and these heads."""
        for what, own, given in (("heads", self.heads, heads), ("batch", self.batch, batch)):
            if own is not None and given is not None and own != given:
                raise ValueError(
                    f"{type(self).__name__}: made for {what}={own}, but the call has {given}"
                )

    def dense(self, n: int, m: int | None = None, *, device: Any = None) -> Tensor:
        """The mask as a bool tensor ``(n, m)``, ``(H, n, m)`` or ``(B, H or 1, n, m)``."""
        m = n if m is None else m
        self.check(n, m)
        i = torch.arange(m - n, m, device=device)[:, None]
        j = torch.arange(m, device=device)[None, :]
        h, b = head_batch_index(self, device)
        out = self.allows(i, j, h, b)
        batch, heads = (1 if x is None else x for x in (self.batch, self.heads))
        shape = (batch, heads, n, m)
        out = out.expand(shape)
        if self.batch is None:
            out = out[0]
            if self.heads is None:
                out = out[0]
        return out.contiguous()

    def layout(
        self,
        n: int,
        m: int | None = None,
        block: int | tuple[int, int] = 128,
        *,
        device: Any = None,
    ) -> BlockLayout:
        """The key blocks that each query block reads, built without an ``n x m`` tensor.

        Args:
            n, m: numbers of queries and keys; ``m`` defaults to ``n``.
            block: block side, or ``(block_q, block_k)``.
            device: where the layout's tensors live (default CPU).
        """
        m = n if m is None else m
        self.check(n, m)
        return build_layout(self, n, m, block, device)

    def density(self, n: int, m: int | None = None) -> float:
        """Exact share of allowed pairs among ``n * m``, averaged over heads and batch."""
        m = n if m is None else m
        if n == 0 or m == 0:
            return 0.0
        layout = self.layout(n, m, 64)
        return layout.allowed_pairs() / (n * m * layout.index.shape[0] * layout.index.shape[1])

    def flex(self, n: int = 0, m: int | None = None) -> MaskMod:
        """The mask as a FlexAttention ``mask_mod(b, h, q_idx, kv_idx)``; ``m - n`` is its offset."""
        offset = 0 if m is None else m - n

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.allows(q_idx + offset, kv_idx, h, b)

        return mask_mod

    def picture(self, n: int, m: int | None = None, width: int = 48) -> str:
        """The mask drawn in text, queries downwards: space, light, medium and full blocks."""
        m = n if m is None else m
        dense = self.dense(n, m).float()
        while dense.dim() > 2:
            dense = dense.mean(0)
        rows, cols = min(n, max(1, width // 2)), min(m, width)
        cells = torch.nn.functional.adaptive_avg_pool2d(dense[None, None], (rows, cols))[0, 0]
        shades = " ░▒▓█"
        level = (cells * 4).ceil().clamp(0, 4).to(torch.int64)
        return "\n".join("".join(shades[c] for c in row) for row in level.tolist())

    def __and__(self, other: Mask) -> Mask:
        return And((self, _mask(other, "&")))

    def __or__(self, other: Mask) -> Mask:
        return Or((self, _mask(other, "|")))

    def __invert__(self) -> Mask:
        return self.part if isinstance(self, Not) else Not(self)


def _mask(other: object, sign: str) -> Mask:
    if not isinstance(other, Mask):
        raise ValueError(f"mask {sign}: expected a Mask, got {type(other).__name__}")
    return other


class MaskGroup(Mask):
    """Masks made of several parts."""

    parts: tuple[Mask, ...]
    sign: str

    def _common(self, what: str) -> int | None:
        found = {getattr(p, what) for p in self.parts} - {None}
        return found.pop() if found else None

    def _agree(self) -> None:
        for what in ("heads", "batch"):
            found = {getattr(p, what) for p in self.parts} - {None}
            if len(found) > 1:
                raise ValueError(
                    f"mask {self.sign}: the parts are made for different {what}: {sorted(found)}"
                )

    @property
    def heads(self) -> int | None:
        return self._common("heads")

    @property
    def batch(self) -> int | None:
        return self._common("batch")

    @property
    def closed(self) -> bool:
        return all(p.closed for p in self.parts)

    @property
    def relative(self) -> bool:
        return all(p.relative for p in self.parts)

    @property
    def constant(self) -> bool:
        return all(p.constant for p in self.parts)

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        for part in self.parts:
            part.check(n, m, heads, batch)

    def __repr__(self) -> str:
        wrapped = [f"({p!r})" if isinstance(p, MaskGroup) else repr(p) for p in self.parts]
        return f" {self.sign} ".join(wrapped)


def _flatten(parts: tuple[Mask, ...], kind: type[MaskGroup]) -> tuple[Mask, ...]:
    flat: list[Mask] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, kind) else (part,))
    return tuple(flat)


@dataclass(frozen=True, repr=False)
class And(MaskGroup):
    """Allowed by every part; written ``a & b``."""

    parts: tuple[Mask, ...]
    sign = "&"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _flatten(self.parts, And))
        self._agree()

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        out = self.parts[0].allows(i, j, h, b)
        for part in self.parts[1:]:
            out = out & part.allows(i, j, h, b)
        return out

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        some, every = self.parts[0].tile(i0, i1, j0, j1, h, b)
        for part in self.parts[1:]:
            s, e = part.tile(i0, i1, j0, j1, h, b)
            some, every = some & s, every & e
        return some, every


@dataclass(frozen=True, repr=False)
class Or(MaskGroup):
    """Allowed by at least one part; written ``a | b``."""

    parts: tuple[Mask, ...]
    sign = "|"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _flatten(self.parts, Or))
        self._agree()

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        out = self.parts[0].allows(i, j, h, b)
        for part in self.parts[1:]:
            out = out | part.allows(i, j, h, b)
        return out

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        some, every = self.parts[0].tile(i0, i1, j0, j1, h, b)
        for part in self.parts[1:]:
            s, e = part.tile(i0, i1, j0, j1, h, b)
            some, every = some | s, every | e
        return some, every


class MaskAround(Mask):
    """A mask made of one other, for the same heads and batch entries and of the same kind."""

    @property
    def inner(self) -> Mask:
        """The mask inside."""
        raise NotImplementedError

    @property
    def heads(self) -> int | None:
        return self.inner.heads

    @property
    def batch(self) -> int | None:
        return self.inner.batch

    @property
    def closed(self) -> bool:
        return self.inner.closed

    @property
    def relative(self) -> bool:
        return self.inner.relative

    @property
    def constant(self) -> bool:
        return self.inner.constant


@dataclass(frozen=True, repr=False)
class Not(MaskAround):
    """Allowed where ``part`` is not; written ``~a``."""

    part: Mask

    @property
    def inner(self) -> Mask:
        return self.part

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        self.part.check(n, m, heads, batch)

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return ~self.part.allows(i, j, h, b)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        some, every = self.part.tile(i0, i1, j0, j1, h, b)
        return ~every, ~some

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, MaskGroup) else f"~{self.part!r}"


@dataclass(frozen=True)
class Shifted(MaskAround):
    """``mask`` evaluated ``by`` positions further on: for caches that dropped their first keys."""

    mask: Mask
    by: int

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask) or not isinstance(self.by, int):
            raise ValueError(f"Shifted: expected a Mask and an integer, got {self!r}")

    @property
    def inner(self) -> Mask:
        return self.mask

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return self.mask.allows(i + self.by, j + self.by, h, b)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        by = self.by
        return self.mask.tile(i0 + by, i1 + by, j0 + by, j1 + by, h, b)

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        self.mask.check(n, m + self.by, heads, batch)


@dataclass(frozen=True, eq=False)
class Predicate(Mask):
    """Any vectorised function ``fn(i, j, h, b)`` of position tensors. Its layouts are evaluated
    pair by pair (in strips, never as one tensor), so a class with a ``tile`` is faster."""

    fn: Callable[[Tensor, Tensor, Index, Index], Tensor]

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return self.fn(i, j, h, b)
