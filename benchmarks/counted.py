"""Counts the query-key pairs that the attention calls of some modules compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from regard import attend


class Count:
    """Attributes: `pairs`, listed pairs over batch and heads, masked ones in listed blocks included."""

    def __init__(self) -> None:
        self.pairs = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """:func:`regard.attend`, counted."""
        layout, mask = options.get("layout"), options.get("mask")
        n, m, rows = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
        if layout is None and mask is not None and n and m:
            layout = mask.layout(n, m, 16)
        if layout is None:
            self.pairs += rows * n * m
        else:
            share = layout.index.shape[0] * layout.index.shape[1]
            self.pairs += layout.listed_pairs() * rows // share
        return attend(q, k, v, **options)


@contextmanager
def counted(*modules: ModuleType) -> Iterator[Count]:
    """Count what `attend` computes where these modules call it."""
    count = Count()
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "attend", count.attend))
        yield count


def slope(sizes: Sequence[int], work: Sequence[float]) -> float:
    """Growth of work with size, as the exponent between the first and the last."""
    return math.log(work[-1] / work[0]) / math.log(sizes[-1] / sizes[0])
