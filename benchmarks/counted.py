"""Counts work: pairs that attention calls compute, numbers that an edit of a method is given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from regard import attend
from regard.models.edit import Site
from regard.models.method import Method


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


@contextmanager
def edited(kind: type[Method], edit: str) -> Iterator[list[int]]:
    """How many numbers each call of an edit was given, while methods of this class are in use.

    Args:
        kind: the method's class.
        edit: name of its function `(self, x, site) -> x`.
    """
    whole, sizes = getattr(kind, edit), []

    def counting(self: Method, x: Tensor, site: Site) -> Tensor:
        sizes.append(x.numel())
        out: Tensor = whole(self, x, site)
        return out

    with mock.patch.object(kind, edit, counting):
        yield sizes


def slope(sizes: Sequence[int], work: Sequence[float]) -> float:
    """Growth of work with size, as the exponent between the first and the last."""
    return math.log(work[-1] / work[0]) / math.log(sizes[-1] / sizes[0])
