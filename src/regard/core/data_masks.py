"""Masks that hold data: documents, padding, arbitrary tensors, one mask a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Index
from .mask import Mask, MaskGroup


def _vector(name: str, field: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() not in (1, 2):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: {field} must be a tensor (M,) or (B, M), got {got}")


def _tensor_text(x: Tensor) -> str:
    """A tensor as text that can be pasted back when it is small, a description when it is not."""
    if x.numel() <= 256:
        return f"torch.tensor({x.tolist()})"
    return f"<{x.dtype} tensor {tuple(x.shape)}>".replace("torch.", "")


def _look_up(x: Tensor, pos: Tensor, b: Index) -> Tensor:
    """``x[pos]`` for (M,) or ``x[b, pos]`` for (B, M), on the device of the positions."""
    x = x.to(pos.device)
    return x[pos] if x.dim() == 1 else x[b, pos]


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """Positions see each other when they carry the same id, as in packed sequences.

    Args:
        ids: int tensor ``(M,)`` or ``(B, M)``, one id a position. A negative id marks padding, which
            sees nothing and is seen by nothing.
    """

    ids: Tensor

    def __post_init__(self) -> None:
        _vector("Documents", "ids", self.ids)
        if self.ids.dtype.is_floating_point or self.ids.dtype == torch.bool:
            raise ValueError(f"Documents: ids must be integers, got {self.ids.dtype}")
        object.__setattr__(self, "_sorted", bool((self.ids.diff(dim=-1) >= 0).all()))

    @property
    def batch(self) -> int | None:
        return None if self.ids.dim() == 1 else self.ids.shape[0]

    @property
    def closed(self) -> bool:
        return self._sorted  # type: ignore[attr-defined, no-any-return]

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        _covers("Documents", self.ids.shape[-1], n, m)

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        mine, theirs = _look_up(self.ids, i, b), _look_up(self.ids, j, b)
        return (mine == theirs) & (theirs >= 0)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        if not self.closed:
            return super().tile(i0, i1, j0, j1, h, b)
        qa, qz = _look_up(self.ids, i0, b), _look_up(self.ids, i1, b)
        ka, kz = _look_up(self.ids, j0, b), _look_up(self.ids, j1, b)
        some = (qa <= kz) & (ka <= qz) & (kz >= 0) & (qz >= 0)
        return some, (qa == qz) & (ka == kz) & (qa == ka) & (ka >= 0)

    def __repr__(self) -> str:
        return f"Documents({_tensor_text(self.ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class Keys(Mask):
    """Keys that may be read at all, whoever asks: padding masks.

    Args:
        valid: bool tensor ``(M,)`` or ``(B, M)``.
    """

    valid: Tensor

    def __post_init__(self) -> None:
        _vector("Keys", "valid", self.valid)
        if self.valid.dtype != torch.bool:
            raise ValueError(f"Keys: valid must be a bool tensor, got {self.valid.dtype}")
        count = torch.nn.functional.pad(self.valid.long().cumsum(-1), (1, 0))
        object.__setattr__(self, "_count", count)

    @property
    def batch(self) -> int | None:
        return None if self.valid.dim() == 1 else self.valid.shape[0]

    closed = True

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if self.valid.shape[-1] < m:
            raise ValueError(f"Keys: valid covers {self.valid.shape[-1]} keys, the call has {m}")

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return _look_up(self.valid, j, b)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        count: Tensor = self._count  # type: ignore[attr-defined]
        held = _look_up(count, j1 + 1, b) - _look_up(count, j0, b)
        wide = torch.zeros_like(i0)
        return held + wide > 0, held + wide == j1 - j0 + 1

    def __repr__(self) -> str:
        return f"Keys({_tensor_text(self.valid)})"


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A mask given pair by pair.

    Args:
        tensor: bool ``(R, M)``, ``(H, R, M)`` or ``(B, H or 1, R, M)``, True where a query may look.
            Row ``r`` is position ``r + M - R``: the rows are the last ``R`` of ``M``.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        t = self.tensor
        if not isinstance(t, Tensor) or t.dtype != torch.bool or t.dim() not in (2, 3, 4):
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"Dense: expected a bool tensor of 2 to 4 dimensions, got {got}")

    @property
    def heads(self) -> int | None:
        wide = self.tensor.dim() > 2 and self.tensor.shape[-3] > 1
        return self.tensor.shape[-3] if wide else None

    @property
    def batch(self) -> int | None:
        return self.tensor.shape[0] if self.tensor.dim() == 4 else None

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        rows, keys = self.tensor.shape[-2:]
        if keys != m or rows < n:
            raise ValueError(f"Dense: the tensor is {rows} x {keys}, the call is {n} x {m}")

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        rows, keys = self.tensor.shape[-2:]
        t, r = self.tensor.to(i.device), i - (keys - rows)
        if t.dim() == 2:
            return t[r, j]
        h = h if self.heads is not None else 0
        return t[h, r, j] if t.dim() == 3 else t[b, h, r, j]

    def __repr__(self) -> str:
        return f"Dense({_tensor_text(self.tensor)})"


@dataclass(frozen=True, repr=False)
class PerHead(MaskGroup):
    """One mask a head: head ``h`` looks where ``masks[h]`` allows."""

    parts: tuple[Mask, ...]
    sign = "per head"

    def __init__(self, masks: tuple[Mask, ...] | list[Mask]) -> None:
        if not isinstance(masks, (tuple, list)) or not all(isinstance(p, Mask) for p in masks):
            raise ValueError(f"PerHead: expected a list of Masks, got {masks!r}")
        if not masks:
            raise ValueError("PerHead: expected a non-empty list of Masks")
        object.__setattr__(self, "parts", tuple(masks))
        if any(p.heads is not None for p in self.parts):
            raise ValueError("PerHead: its masks must not be made for several heads themselves")
        self._agree()

    @property
    def heads(self) -> int | None:
        return len(self.parts)

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        Mask.check(self, n, m, heads, batch)
        for part in self.parts:
            part.check(n, m, None, batch)

    def _pick(self, values: list[Tensor], h: Index) -> Tensor:
        if isinstance(h, int):
            return values[h]
        out = values[0] & (h == 0)
        for at, value in enumerate(values[1:], 1):
            out = out | (value & (h == at))
        return out

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return self._pick([p.allows(i, j, 0, b) for p in self.parts], h)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        some, every = zip(*(p.tile(i0, i1, j0, j1, 0, b) for p in self.parts), strict=True)
        return self._pick(list(some), h), self._pick(list(every), h)

    def __repr__(self) -> str:
        return f"PerHead([{', '.join(repr(p) for p in self.parts)}])"


def _covers(name: str, length: int, n: int, m: int) -> None:
    if length < m:
        raise ValueError(f"{name}: ids cover {length} positions, the call has {m} keys")
    if n > m:
        raise ValueError(f"{name}: needs as many keys as queries at least, got {n} and {m}")
