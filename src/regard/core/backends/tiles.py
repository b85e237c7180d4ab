"""The arithmetic of one tile: a batch of query rows against the keys listed for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

# Scores of one tile: 2 MB in float32, which stays in the caches of two cores (measured best).
TILE_PAIRS = 1 << 19


class Tile(Protocol):
    """Query rows ``(T, R, D)`` against keys ``(T, L, D)`` and values ``(T, L, Dv)``."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def may_be_empty(self) -> bool:
        """Whether some row may have no key at all."""
        ...

    def block(self, scores: Tensor) -> None:
        """Set to -inf, in place, the scores of pairs that are not allowed."""
        ...

    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index tensors ``i, j, h, b`` of the pairs, for biases; they broadcast to :meth:`by_head`."""
        ...

    def by_head(self, scores: Tensor) -> Tensor:
        """``(T, R, L)`` in the shape that :meth:`where` broadcasts to."""
        ...

    def write(self, out: Tensor, lse: Tensor | None) -> None: ...

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the output ``(T, R, Dv)``, delta and lse ``(T, R, 1)`` of these rows."""
        ...

    def add(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None: ...


class Tiles(Protocol):
    """All tiles of one call, and what they write to."""

    def __iter__(self) -> Iterator[Tile]: ...

    def result(self) -> tuple[Tensor, Tensor]: ...

    def open_gradients(self, grad_out: Tensor, delta: Tensor, lse: Tensor) -> None: ...

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]: ...


def _scores(tile: Tile, scale: float, bias: Tensor | None) -> Tensor:
    s = torch.bmm(tile.q * scale if scale != 1.0 else tile.q, tile.k.transpose(1, 2))
    if bias is not None:
        tile.by_head(s).add_(bias)
    tile.block(s)
    return s


def _kept(like: Tensor, drop: tuple[float, int]) -> Tensor:
    """Dropout factors of a tile, the same in forward and backward."""
    p, seed = drop
    generator = torch.Generator(like.device).manual_seed(seed)
    kept = torch.rand(like.shape, generator=generator, device=like.device) >= p
    return kept.to(like.dtype) / (1.0 - p)


def forward_tile(
    tile: Tile, scale: float, bias: Tensor | None, drop: tuple[float, int], keep_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output ``(T, R, Dv)`` and, if asked for, log-sum-exp ``(T, R)`` of a tile."""
    s = _scores(tile, scale, bias)
    may_be_empty = tile.may_be_empty or bias is not None
    top = s.amax(-1) if keep_lse or may_be_empty else None
    # On CPU the kernel reads a whole row before it writes it, so it may work in place.
    p = torch.softmax(s, -1, out=s) if s.device.type == "cpu" else torch.softmax(s, -1)
    empty = None
    if may_be_empty:
        assert top is not None
        empty = top == float("-inf")
        p.masked_fill_(empty.unsqueeze(-1), 0.0)
    lse = None
    if keep_lse:
        assert top is not None
        # The largest weight of a row is exp(top - lse).
        lse = top - p.amax(-1).log()
        if empty is not None:
            lse.masked_fill_(empty, float("-inf"))
    if drop[0] > 0.0:
        p.mul_(_kept(p, drop))
    return torch.bmm(p, tile.v), lse


def backward_tile(tile: Tile, scale: float, bias: Tensor | None, drop: tuple[float, int]) -> Tensor:
    """Add a tile's gradients to q, k and v; returns those of its scores ``(T, R, L)``."""
    grad_out, delta, lse = tile.rows()
    p = _scores(tile, scale, bias)
    p.sub_(lse.masked_fill(lse == float("-inf"), float("inf"))).exp_()
    ds = torch.bmm(grad_out, tile.v.transpose(1, 2))
    weights = p
    if drop[0] > 0.0:
        kept = _kept(p, drop)
        ds.mul_(kept)
        weights = p * kept
    dv = torch.bmm(weights.transpose(1, 2), grad_out)
    ds.sub_(delta).mul_(p)
    dq = torch.bmm(ds, tile.k)
    dk = torch.bmm(ds.transpose(1, 2), tile.q)
    if scale != 1.0:
        dq.mul_(scale)
        dk.mul_(scale)
    tile.add(dq, dk, dv)
    return ds
