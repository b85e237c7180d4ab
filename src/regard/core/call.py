"""What one attention call asks for, as every backend receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .bias import Bias
    from .layout import BlockLayout
    from .masks import Mask
    from .windows import Windows


@dataclass(frozen=True, eq=False)
class Call:
    """One checked call of :func:`regard.attend`, without its tensors.

    Attributes:
        mask: where a query may look; ``None`` means everywhere.
        layout: key blocks to read. If given, its ``mask`` field already holds ``mask``.
        windows: tiles of a grid to read instead of a layout; they hold all that ``mask`` allows.
        bias: additive score term, not multiplied by ``scale``.
        scale: factor on ``q @ k^T``.
        dropout: probability of dropping an attention weight.
        generator: source of randomness for dropout.
        need_lse: the caller uses the log-sum-exp (or a gradient through it).
    """

    mask: Mask | None
    layout: BlockLayout | None
    bias: Bias | None
    scale: float
    dropout: float = 0.0
    generator: torch.Generator | None = None
    need_lse: bool = False
    windows: Windows | None = None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores and softmax are computed: float64 stays, everything else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
