"""Pairs of a tile that are not allowed, set to -inf through their bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Bytes kept with one layout or one set of windows; what goes beyond is made anew at each call.
_KEEP = 1 << 27


@dataclass(frozen=True, eq=False)
class Hidden:
    """What turns a tile's scores ``(..., R, L)`` of pairs that are not allowed into -inf.

    Bits of 32, times 1 or 0 plus those of -inf: NaN becomes -inf as well, in the time that adding -inf
    takes. Filling by a bool mask takes several times as long.

    Attributes:
        kept: int32 ``(R, words * L)``, 1 where a pair is allowed and 0 elsewhere.
        bits: the same, 0 where it is allowed and the bits of -inf elsewhere.
    """

    kept: Tensor
    bits: Tensor

    @classmethod
    def of(cls, allowed: Tensor, dtype: torch.dtype) -> Hidden:
        """For scores of a dtype, from a bool ``(R, L)``."""
        penalty = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        penalty.masked_fill_(~allowed, -torch.inf)
        kept = allowed.int().repeat_interleave(penalty.element_size() // 4, dim=-1)
        return cls(kept, penalty.view(torch.int32))

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes + self.bits.nbytes

    def apply(self, scores: Tensor) -> None:
        """In place."""
        found = scores.view(torch.int32)
        torch.addcmul(self.bits, found, self.kept, out=found)


def remembered(memo: dict[Any, Any], key: object, make: Callable[[], Hidden]) -> Hidden:
    """What stands in ``memo`` under ``("hidden", key)``; made and, where there is room, kept there."""
    found: Hidden | None = memo.get(("hidden", key))
    if found is None:
        found = make()
        held = memo.get("held", 0) + found.nbytes
        if held <= _KEEP:
            memo["hidden", key], memo["held"] = found, held
    return found
