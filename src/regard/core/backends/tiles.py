"""The arithmetic of one tile: a batch of query rows against the keys listed for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Scratch:
    """Buffers that are used again for every tile: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor; the one taken before under this name is overwritten."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """``factor * a @ b`` of batched matrices, in a buffer."""
        out = self.take(name, (a.shape[0], a.shape[1], b.shape[2]), a)
        if factor == 1.0:
            return torch.bmm(a, b, out=out)
        return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


class Tile(Protocol):
    """Query rows ``(T, R, D)`` against keys ``(T, L, D)`` and values ``(T, L, Dv)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    scratch: Scratch

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
    s = tile.scratch.product("scores", tile.q, tile.k.transpose(1, 2), scale)
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
    """Output ``(T, R, Dv)`` and, if asked for, log-sum-exp ``(T, R)`` of a tile.

    The output lies in a buffer that the next tile overwrites.
    """
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
    return tile.scratch.product("out", p, tile.v), lse


def backward_tile(tile: Tile, scale: float, bias: Tensor | None, drop: tuple[float, int]) -> Tensor:
    """Add a tile's gradients to q, k and v; returns those of its scores ``(T, R, L)``."""
    scratch = tile.scratch
    grad_out, delta, lse = tile.rows()
    p = _scores(tile, scale, bias)
    p.sub_(lse.masked_fill(lse == float("-inf"), float("inf"))).exp_()
    ds = scratch.product("ds", grad_out, tile.v.transpose(1, 2))
    weights = p
    if drop[0] > 0.0:
        kept = _kept(p, drop)
        ds.mul_(kept)
        weights = p * kept
    dv = scratch.product("dv", weights.transpose(1, 2), grad_out)
    ds.sub_(delta).mul_(p)
    dq = scratch.product("dq", ds, tile.k, scale)
    dk = scratch.product("dk", ds.transpose(1, 2), tile.q, scale)
    tile.add(dq, dk, dv)
    return ds
