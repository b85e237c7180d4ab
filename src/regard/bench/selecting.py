"""The selectors and other methods that ``regard compare`` knows by name.

The number after the colon is what a query reads, in keys, so that equal numbers mean equal budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ..core.masks import Mask
from ..core.select import Selector
from ..models.method import Method
from ..sparse.generic import BlockTopK, ExactTopK, VerticalSlash

How: TypeAlias = Mask | Selector | Method

# Tokens a block of the block selectors: what runs best on a CPU.
_BLOCK = 64


@dataclass(frozen=True)
class Heads:
    """What a method that differs between heads needs to know of a model.

    Attributes:
        query: query heads of a layer.
        kv: key heads, a divisor of ``query``.
    """

    query: int
    kv: int


@dataclass(frozen=True)
class Kind:
    """A name that ``regard compare`` knows.

    Attributes:
        meaning: what the number after the colon means.
        default: that number at a length in tokens.
        make: the method of that number, for a model's heads.
    """

    meaning: str
    default: Callable[[int], int]
    make: Callable[[int, Heads], How]


def _budget(length: int) -> int:
    return max(4 * _BLOCK, length // 5)


def _blocks(keys: int) -> int:
    return max(1, keys // _BLOCK)


SELECTING: dict[str, Kind] = {
    "exact-topk": Kind(
        "keys, in blocks of 64", _budget, lambda keys, heads: ExactTopK(_blocks(keys), _BLOCK)
    ),
    "mean-topk": Kind(
        "keys, in blocks of 64", _budget, lambda keys, heads: BlockTopK(_blocks(keys), _BLOCK)
    ),
    "bounds-topk": Kind(
        "keys, in blocks of 64",
        _budget,
        lambda keys, heads: BlockTopK(_blocks(keys), _BLOCK, summary="bounds"),
    ),
    "vertical-slash": Kind(
        "keys, in blocks of 64", _budget, lambda keys, heads: VerticalSlash(_blocks(keys), _BLOCK)
    ),
}
