"""Whether a call is causal softmax attention and nothing else, for methods that compute it anew."""

from __future__ import annotations

from ..core.data_masks import Keys
from ..core.masks import And, Causal
from .calls import AttentionCall


def beyond_causal(call: AttentionCall) -> str | None:
    """What a call has besides causal softmax attention over its real tokens; ``None`` for nothing.

    Padding in front of the tokens and behind them is nothing.
    """
    given = {
        "packed sequences": call.own.start is not None and call.own.start.dim() > 1,
        "another mask": not _only_causal(call),
        "a layout": call.layout is not None,
        "a bias": call.bias is not None,
        "attention sinks": call.sinks is not None,
        "dropout": call.dropout > 0,
        "soft-capped scores": call.softcap is not None,
        "edits of its weights": any(not edit.observes for edit in call.edits),
    }
    return next((what for what, there in given.items() if there), None)


def _only_causal(call: AttentionCall) -> bool:
    valid = call.own.valid
    parts = call.mask.parts if isinstance(call.mask, And) else (call.mask,)
    others = [part for part in parts if not isinstance(part, Causal)]
    if len(others) == len(parts):
        return False
    if valid is None:
        return not others
    # Real and padded places alternate at most twice: padding, tokens, padding.
    begins = (valid[:, 1:] & ~valid[:, :-1]).sum(-1) + valid[:, 0]
    mine = all(isinstance(part, Keys) and part.valid is valid for part in others)
    return mine and bool((begins <= 1).all())
