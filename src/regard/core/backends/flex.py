"""FlexAttention over the same layout: PyTorch's compiled block-sparse kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..layout import BlockLayout

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def why_not(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """FlexAttention serves no float64, no dropout, no permutation, and on CPU inference alone."""
    if call.layout is None:
        return "it needs a layout or a mask, and at least one query and one key"
    if call.layout.permuted:
        return "FlexAttention cannot permute tokens"
    if call.dropout > 0.0:
        return "FlexAttention has no dropout"
    if q.dtype == torch.float64:
        return "FlexAttention does not compute in float64"
    if call.layout.block_q % 128 or call.layout.block_k % 128:
        return f"its blocks are multiples of 128, the layout's are {call.layout.block}"
    learned = () if call.bias is None else call.bias.tensors()
    if q.device.type == "cpu":
        if call.need_lse:
            return "FlexAttention on CPU does not return the log-sum-exp"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *learned)):
            return "FlexAttention on CPU has no backward"
    elif min(q.shape[-1], v.shape[-1]) < 16:
        return "FlexAttention on a GPU needs heads of width 16 at least"
    return None


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_mask(layout: BlockLayout) -> Any:
    """The layout as a FlexAttention ``BlockMask``, made once and kept with it."""
    from torch.nn.attention.flex_attention import BlockMask

    if "flex" not in layout.memo:
        mod = None if layout.mask is None else layout.mask.flex(layout.n, layout.m)
        tables: list[Tensor] = []
        for flags in (layout.partial, ~layout.partial):
            wanted = flags & (layout.index >= 0)
            order = torch.argsort((~wanted).to(torch.int8), dim=-1, stable=True)
            ids = torch.where(wanted, layout.index, 0).gather(-1, order).to(torch.int32)
            # BlockMask reads the number of key blocks off the width of its table.
            ids = torch.nn.functional.pad(ids, (0, layout.key_blocks - ids.shape[-1]))
            tables += [wanted.sum(-1).to(torch.int32), ids.contiguous()]
        layout.memo["flex"] = BlockMask.from_kv_blocks(
            tables[0],
            tables[1],
            tables[2],
            tables[3],
            BLOCK_SIZE=layout.block,
            mask_mod=mod,
            seq_lengths=(layout.n, layout.m),
        )
    return layout.memo["flex"]


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Attention through the compiled ``flex_attention``; the first call compiles."""
    from torch.nn.attention.flex_attention import AuxRequest

    layout = call.layout
    assert layout is not None
    options: dict[str, Any] = {
        "block_mask": block_mask(layout),
        "scale": call.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if call.bias is not None:
        bias, offset = call.bias, layout.m - layout.n

        def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + bias.scores(i + offset, j, h, b)

        options["score_mod"] = score_mod
    if not call.need_lse:
        return _compiled()(q, k, v, **options), None
    out, aux = _compiled()(q, k, v, return_aux=AuxRequest(lse=True), **options)
    return out, aux.lse
