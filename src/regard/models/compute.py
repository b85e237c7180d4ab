"""The bottom of the stack: one attention call, with the rows that edits ask for made explicit."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..core.attend import attend
from ..core.call import compute_dtype
from ..core.layout import BlockLayout, head_batch_index
from ..core.mask import Mask
from .calls import AttentionCall
from .edit import Site

# entries of one tile of explicit weights: 64 MB in float32
_TILE = 1 << 24


def compute(call: AttentionCall) -> Tensor:
    """The output ``(B, H, N, Dv)`` of a call, its edits applied.

    Rows that no edit changes go through :func:`regard.attend`. The others are computed in tiles of
    query rows in float32, in ``O(tile * M)`` memory. Soft-capped scores have no fast kernel: all
    their rows are explicit.
    """
    if not call.edits and call.softcap is None:
        return _fast(call)
    touched, changed = _rows(call)
    if call.softcap is not None or bool(changed.all()):
        return _explicit(call, torch.arange(call.n), keep=True)
    out = _fast(call)
    if bool(touched.any()):
        explicit = _explicit(call, touched.nonzero().flatten(), keep=bool(changed.any()))
        if bool(changed.any()):
            place = changed[touched].nonzero().flatten().to(out.device)
            rows = changed.nonzero().flatten().to(out.device)
            out = out.index_copy(2, rows, explicit[:, :, place])
    return out


def _rows(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Rows with any edit, and rows with one that changes something; bool ``(N,)`` on the CPU."""
    rows = call.rows.cpu()
    touched = torch.zeros(call.n, dtype=torch.bool)
    changed = touched.clone()
    for edit in call.edits:
        chosen = torch.ones_like(touched) if edit.everywhere else edit.chosen(rows, call.passing)
        touched |= chosen
        if not edit.observes:
            changed |= chosen
    return touched, changed


def _fast(call: AttentionCall) -> Tensor:
    result: Any = attend(
        call.q,
        call.k,
        call.v,
        mask=call.mask,
        layout=call.layout,
        bias=call.bias,
        scale=call.scale,
        dropout=call.dropout,
        return_lse=call.sinks is not None,
    )
    if call.sinks is None:
        plain: Tensor = result
        return plain
    out, lse = cast("tuple[Tensor, Tensor]", result)
    # a sink is one more key with score s and value 0: it takes exp(s) / (exp(lse) + exp(s))
    kept = torch.sigmoid(lse - call.sinks.to(lse.dtype)[:, None])
    return (out * kept[..., None]).to(call.q.dtype)


def _explicit(call: AttentionCall, rows: Tensor, keep: bool) -> Tensor:
    """Output ``(B, H, R, Dv)`` of some rows from explicit weights; empty unless ``keep``."""
    batch, heads = call.q.shape[:2]
    size = max(1, _TILE // max(1, batch * heads * call.m))
    kept: list[Tensor] = []
    for part in rows.split(size):
        tile = _tile(call, part.to(call.q.device))
        if keep:
            kept.append(tile)
    return torch.cat(kept, 2) if kept else call.q.new_empty(0)


def _tile(call: AttentionCall, rows: Tensor) -> Tensor:
    q, k, v = call.q, call.k, call.v
    wide = compute_dtype(q.dtype)
    # rows of the query heads that share a key head lie under each other: keys are read once
    grouped = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1] * rows.numel())
    part = (q if rows.numel() == call.n else q[:, :, rows]).to(wide).reshape(*grouped, q.shape[3])
    scores = torch.matmul(part, k.to(wide).mT).view(q.shape[0], q.shape[1], -1, call.m) * call.scale
    if call.bias is not None:
        scores = scores + _bias(call, rows).to(wide)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    allowed = _allowed(call, rows)
    hidden = ~allowed
    scores = scores.masked_fill(hidden, -torch.inf)
    edited = _edit(call, "logits", scores, rows, allowed)
    scores = scores if edited is scores else edited.masked_fill(hidden, -torch.inf)
    softmax = _softmax(scores, call.sinks)
    weights = _edit(call, "weights", softmax, rows, allowed)
    weights = weights if weights is softmax else weights.masked_fill(hidden, 0)
    if call.dropout > 0:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    out = torch.matmul(weights.reshape(*grouped, call.m), v.to(wide))
    return out.view(q.shape[0], q.shape[1], -1, v.shape[3]).to(q.dtype)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys; rows without keys give zeros; ``sinks`` enter the denominator."""
    if sinks is None:
        return scores.softmax(-1).masked_fill(scores == -torch.inf, 0)
    extra = sinks.to(scores.dtype)[:, None, None]
    top = torch.maximum(scores.detach().amax(-1, keepdim=True), extra.detach())
    raised = torch.exp(scores - top)
    return raised / (raised.sum(-1, keepdim=True) + torch.exp(extra - top))


def _allowed(call: AttentionCall, rows: Tensor) -> Tensor:
    """Which keys these rows see, bool, broadcasts to ``(B, H, R, M)``."""
    if call.n > 1 or call.layout is not None:
        return _asked(call, rows)
    # a decoding step has no time to lose: layers of one mask ask once
    key = call.mask, call.m, rows.device
    if key not in call.passing.allowed:
        call.passing.allowed[key] = _asked(call, rows)
    return call.passing.allowed[key]


def _asked(call: AttentionCall, rows: Tensor) -> Tensor:
    i = (rows + call.m - call.n)[:, None]
    j = torch.arange(call.m, device=rows.device)[None]
    allowed = _mask_rows(call.mask, i, j)
    if call.layout is not None:
        allowed = allowed & _listed(call.layout, rows, j, call.q.shape[1])
        if call.layout.mask is not None:
            allowed = allowed & _mask_rows(call.layout.mask, i, j)
    return allowed


def _mask_rows(mask: Mask, i: Tensor, j: Tensor) -> Tensor:
    h, b = head_batch_index(mask, i.device)
    allowed = mask.allows(i, j, h, b)
    return allowed[(None,) * (4 - allowed.dim())]


def _listed(layout: BlockLayout, rows: Tensor, j: Tensor, heads: int) -> Tensor:
    """Whether a layout lists the block of each pair, ``(B or 1, H or 1, R, M)``."""
    if layout.perm_q is not None or layout.perm_k is not None:
        # permuted blocks hold scattered rows; the dense form sorts them out
        dense = layout.to(rows.device).dense()[:, :, rows]
    else:
        index = layout.index.to(rows.device)[:, :, rows // layout.block_q]
        blocks = -(-layout.m // layout.block_k)
        slots = index.new_zeros((*index.shape[:3], blocks + 1), dtype=torch.bool)
        slots.scatter_(-1, torch.where(index < 0, blocks, index), True)
        dense = slots[..., (j // layout.block_k).flatten()]
    kinds = dense.shape[1]
    return dense if kinds in (1, heads) else dense.repeat_interleave(heads // kinds, 1)


def _bias(call: AttentionCall, rows: Tensor) -> Tensor:
    """Additive scores of these rows, broadcasts to ``(B, H, R, M)``."""
    assert call.bias is not None
    i = (rows + call.m - call.n)[:, None]
    j = torch.arange(call.m, device=rows.device)[None]
    h = torch.arange(call.q.shape[1], device=rows.device).view(1, -1, 1, 1)
    b = torch.arange(call.q.shape[0], device=rows.device).view(-1, 1, 1, 1)
    return call.bias.scores(i, j, h, b)


def _edit(call: AttentionCall, name: str, x: Tensor, rows: Tensor, allowed: Tensor) -> Tensor:
    """Apply the call's edits of one site to a tile ``(B, H, R, M)``."""
    if all(edit.site != name for edit in call.edits):
        return x
    columns = call.rows[rows].cpu()
    for edit in call.edits:
        if edit.site != name:
            continue
        if edit.everywhere:
            chosen = torch.arange(columns.numel())
        else:
            chosen = edit.chosen(columns, call.passing).nonzero().flatten()
        heads = edit.head_index(x.shape[1], x.device)
        if not chosen.numel() or not heads.numel():
            continue
        whole = (heads.numel(), chosen.numel()) == x.shape[1:3]
        at = (slice(None), heads[:, None], chosen.to(x.device))
        site = Site(
            name=name,
            layer=call.layer,
            rows=columns[chosen],
            heads=heads,
            passing=call.passing,
            owner=edit.owner,
            call=call,
            allowed=allowed.expand(x.shape) if whole else allowed.expand(x.shape)[at],
        )
        # a copy: a function may change what it is given
        out = edit.apply(x.clone() if whole else x[at], site)
        if edit.observes:
            continue
        if whole:
            x = out.to(x.dtype)
        else:
            x = x.clone()
            x[at] = out.to(x.dtype)
    return x
