"""The text that models are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_text(path: Path | str) -> str:
    """A user's text file.

    Raises:
        ValueError: it is not UTF-8 text, or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 text ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"text: {path} is empty")
    return text


def tokens(tokenizer: Any, text: str, length: int, name: str = "the text") -> Tensor:
    """The first ``length`` tokens of a text, int64 ``(1, length)``.

    Raises:
        ValueError: the text has fewer.
    """
    # A text of this many characters a token would be unheard of; the rest need not be tokenised.
    ids = tokenizer(text[: 16 * length], add_special_tokens=False)["input_ids"][:length]
    if len(ids) < length:
        raise ValueError(f"{name} has {len(ids)} tokens, {length} were asked for; lower --length")
    return torch.tensor(ids, dtype=torch.int64)[None]
