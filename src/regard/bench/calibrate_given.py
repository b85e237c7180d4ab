"""What a calibration reads, and what it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..models import MadeFor, Spans
from ..models.progress import Progress

# What the context's span is called.
IMAGE = "image"

Save: TypeAlias = Callable[[str], None]
Made: TypeAlias = tuple[Save, dict[str, Any]]


@dataclass(frozen=True)
class Given:
    """What a calibration reads.

    Attributes:
        model: a transformers decoder.
        ids: tokens of the text or of the prompt, ``(1, N)``.
        after: as many tokens behind them in the text, where it has them.
        spans: of a prompt.
        layers: asked for.
        progress: called with (words, steps done, steps in all).
        made_for: what the file says of the model.
    """

    model: Any
    ids: Tensor
    after: Tensor | None = None
    spans: Spans | None = None
    layers: list[int] | None = None
    progress: Progress | None = None
    made_for: MadeFor | None = None

    def fits(self, n: int) -> None:
        """Raise unless the model has ``n`` positions."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and n > limit:
            raise ValueError(f"calibrate: {n} tokens, but the model has {limit} positions")
