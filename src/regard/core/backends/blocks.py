"""Block-sparse attention in plain PyTorch: every device and dtype, forward and backward.

Only the blocks of the layout are computed. A tile is a few query blocks against their key blocks,
small enough that scores stay in cache; full blocks are not masked, partial ones are. Windows of a
grid have tiles of their own, which need no layout. There is no compilation and no warm-up; compiled code
calls it as it is, instead of unrolling its tiles.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bias import Bias
from ..call import Call, compute_dtype
from . import one_row
from .gathered import GatheredTiles
from .slices import SliceTiles
from .strips import StripTiles
from .tiles import Tile, Tiles, backward_tile, forward_tile


def why_not(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """Serves every call that has a layout or windows, and something to compute."""
    if call.layout is None and call.windows is None:
        return "it needs a layout or a mask, and at least one query and one key"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Attention over the blocks of ``call.layout``, or over ``call.windows``; differentiable, also
    through the lse."""
    if torch.compiler.is_compiling():
        # Decorating at import would load the compiler, which takes a second.
        return cast("tuple[Tensor, Tensor | None]", torch.compiler.disable(_run)(q, k, v, call))
    return _run(q, k, v, call)


def _run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    if one_row.serves(q, call):
        return one_row.run(q, k, v, call)
    seed = 0
    if call.dropout > 0.0:
        device = "cpu" if call.generator is None else call.generator.device
        seed = int(torch.randint(1 << 62, (), generator=call.generator, device=device))
    learned = () if call.bias is None else call.bias.tensors()
    out, lse = _Blocks.apply(q, k, v, call, seed, *learned)  # type: ignore[no-untyped-call]
    return out, lse if call.need_lse else None


def _tiles(q: Tensor, k: Tensor, v: Tensor, call: Call, keep_lse: bool = True) -> Tiles:
    if call.windows is not None:
        return StripTiles(q, k, v, call.windows, keep_lse)
    layout = call.layout
    assert layout is not None
    if layout.index.shape[:2] != (1, 1):
        return GatheredTiles(q, k, v, layout)
    return SliceTiles(q, k, v, layout, keep_lse)


def _bias_scores(bias: Bias | None, tile: Tile) -> Tensor | None:
    return None if bias is None else bias.scores(*tile.where())


class _Blocks(torch.autograd.Function):
    """One pass over the tiles forward, one backward with the scores computed again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, seed: int, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(q.dtype)
        keep_lse = call.need_lse or any(x.requires_grad for x in (q, k, v, *learned))
        tiles = _tiles(q.to(dtype), k.to(dtype), v.to(dtype), call, keep_lse)
        for number, tile in enumerate(tiles):
            drop = (call.dropout, seed + number)
            tile.write(
                *forward_tile(tile, call.scale, _bias_scores(call.bias, tile), drop, keep_lse)
            )
        out, lse = tiles.result()
        ctx.call, ctx.seed = call, seed
        ctx.save_for_backward(q, k, v, out, lse, *learned)
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *learned = ctx.saved_tensors
        call: Call = ctx.call
        dtype = out.dtype
        grad_out = grad_out.to(dtype)
        delta = (grad_out * out).sum(-1) - grad_lse
        delta = delta.masked_fill(lse == float("-inf"), 0.0)
        tiles = _tiles(q.to(dtype), k.to(dtype), v.to(dtype), call)
        tiles.open_gradients(grad_out, delta, lse)
        buffers = tuple(torch.zeros_like(x) for x in learned)
        for number, tile in enumerate(tiles):
            drop = (call.dropout, ctx.seed + number)
            scores = _bias_scores(call.bias, tile)
            ds = backward_tile(tile, call.scale, scores, drop)
            if call.bias is not None and buffers:
                call.bias.accumulate(buffers, tile.by_head(ds), *tile.where())
        dq, dk, dv = tiles.gradients()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, *buffers
