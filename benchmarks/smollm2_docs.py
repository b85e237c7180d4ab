"""SmolLM2 on Python's own documentation: the bed on which claims of the papers are tried.

The text is ``pydoc_data.topics``, the language reference that every Python brings along.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.models import load


@lru_cache(maxsize=1)
def _loaded() -> tuple[Any, Any]:
    model, tokenizer = load("smollm2")
    return model.eval(), tokenizer


@lru_cache(maxsize=1)
def _text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def documents(windows: int = 1, length: int = 1024) -> tuple[Any, list[Tensor]]:
    """The model in evaluation mode and consecutive windows of token ids, each ``(1, length)``."""
    model, tokenizer = _loaded()
    # Four characters a token leave ample room.
    text = _text()[: windows * length * 8]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[1] < windows * length:
        raise ValueError(
            f"documents: the text has {ids.shape[1]} tokens, {windows} windows of {length} need more"
        )
    return model, [ids[:, i * length : (i + 1) * length] for i in range(windows)]


@torch.no_grad()
def nll(model: Any, ids: Tensor, first: int = 256) -> float:
    """Mean next-token loss in nats over the positions from ``first`` on."""
    logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.float(), ids[0, first:]))
