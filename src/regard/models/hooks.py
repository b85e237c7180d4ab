"""Edits outside the attention function: forward hooks at the sites of a layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calls import Pass
from .edit import IN_ATTENTION, Edit, Site
from .sites import LayerSites
from .tracking import Tracker, bound, given_tokens


def hook_edit(
    root: nn.Module,
    layers: list[LayerSites],
    tracker: Tracker,
    edit: Edit,
    head: nn.Module | None,
) -> list[RemovableHandle]:
    """Hook one edit; edits of ``logits`` and ``weights`` need none.

    Args:
        head: the language-model head, for ``lm_logits``.
    """
    assert not callable(edit.layers)
    wrong = [i for i in edit.layers or () if not 0 <= i < len(layers)]
    if wrong:
        raise ValueError(f"Edit at {edit.site!r}: layers {wrong}, but the model has {len(layers)}")
    if edit.site in IN_ATTENTION:
        return []
    if edit.site == "positions":
        hook = _Positions(edit, tracker)
        return [root.register_forward_pre_hook(hook, with_kwargs=True)]
    if edit.site == "lm_logits":
        if head is None:
            raise ValueError("Edit at 'lm_logits': the model has no language-model head")
        return [head.register_forward_hook(_Output(edit, tracker, -1))]
    handles = []
    for index, sites in enumerate(layers):
        if not edit.at_layer(index):
            continue
        module = sites.module(edit.site, index)
        if edit.site == "heads":
            handles.append(module.register_forward_pre_hook(_Heads(edit, tracker, index)))
        else:
            handles.append(module.register_forward_hook(_Output(edit, tracker, index)))
    return handles


def _passing(tracker: Tracker, edit: Edit) -> Pass:
    if tracker.passing is None:
        raise ValueError(f"Edit at {edit.site!r}: its module ran outside a pass of the decoder")
    return tracker.passing


def _edit_rows(
    edit: Edit, passing: Pass, x: Tensor, layer: int, heads: Tensor | None = None
) -> Tensor:
    """``x`` ``(B, N, ...)`` with the edit applied to its chosen rows (and heads, dimension 2)."""
    rows = passing.rows[passing.n - x.shape[1] :]  # a head may be given the last rows only
    chosen = edit.chosen(rows, passing).nonzero().flatten()
    if not chosen.numel() or (heads is not None and not heads.numel()):
        return x
    site = Site(edit.site, layer, rows[chosen], heads, passing, edit.owner)
    chosen = chosen.to(x.device)
    at = (slice(None), chosen) if heads is None else (slice(None), chosen[:, None], heads)
    out = edit.apply(x[at], site)
    if edit.observes:
        return x
    x = x.clone()
    x[at] = out.to(x.dtype)
    return x


class _Output:
    """Forward hook: edits a module's output, or the first entry of an output tuple."""

    def __init__(self, edit: Edit, tracker: Tracker, layer: int) -> None:
        self.edit, self.tracker, self.layer = edit, tracker, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        x = _edit_rows(self.edit, _passing(self.tracker, self.edit), first, self.layer)
        return (x, *output[1:]) if isinstance(output, tuple) else x


class _Heads:
    """Forward-pre-hook of the output projection: edits what the heads put out."""

    def __init__(self, edit: Edit, tracker: Tracker, layer: int) -> None:
        self.edit, self.tracker, self.layer = edit, tracker, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        passing, x = _passing(self.tracker, self.edit), args[0]
        count = passing.heads[self.layer]
        heads = self.edit.head_index(count, x.device)
        split = x.unflatten(-1, (count, -1))
        return (_edit_rows(self.edit, passing, split, self.layer, heads).flatten(-2), *args[1:])


class _Positions:
    """Forward-pre-hook of the decoder: edits the position ids that it is given, or would make."""

    def __init__(self, edit: Edit, tracker: Tracker) -> None:
        self.edit, self.tracker = edit, tracker

    def __call__(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = bound(inspect.signature(root.forward), args, kwargs)
        passing, tokens = _passing(self.tracker, self.edit), given_tokens(given)
        assert tokens is not None
        before = given.get("position_ids")
        before = passing.rows.to(tokens.device)[None] if before is None else before
        site = Site("positions", -1, passing.rows, None, passing, self.edit.owner)
        after = self.edit.apply(before, site)
        if self.edit.observes:
            return args, kwargs
        if given.get("attention_mask") is None:
            # without a mask transformers takes jumps in the positions for packed sequences
            given["attention_mask"] = torch.ones(
                tokens.shape[0], passing.past + passing.n, dtype=torch.int64, device=tokens.device
            )
        self.tracker.moved(after)
        return (), {**given, "position_ids": after}
