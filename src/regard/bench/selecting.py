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
from ..sparse.adaptive import AdaptiveTopK
from ..sparse.cca_method import CCA
from ..sparse.generic import BlockTopK, ExactTopK, VerticalSlash
from ..sparse.hip import HiP
from ..sparse.hyper_method import HyperAttention
from ..sparse.longheads import LongHeads
from ..sparse.tidaldecode import TidalDecode

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


def budget(length: int) -> int:
    """Keys a query that make a quarter of the pairs of causal attention."""
    return max(4 * _BLOCK, round(length * 0.134))


def _blocks(keys: int) -> int:
    return max(1, keys // _BLOCK)


def _hip(keys: int) -> Selector:
    window = min(128, keys // 4)
    side = 8 if keys >= 64 else 1
    return HiP(max(side, (keys - window) // side * side), block_q=64, block_k=side, window=window)


def _longheads(keys: int) -> Method:
    # At least four chunks, of the paper's 256 tokens where there is room for it.
    chunk = min(256, max(1, keys // 16))
    length = max(4, keys // chunk) * chunk
    return LongHeads(window=chunk, length=length, start=length)


_IN_BLOCKS = "keys a query reads, in blocks of 64"
SELECTING: dict[str, Kind] = {
    "exact-topk": Kind(_IN_BLOCKS, budget, lambda keys, heads: ExactTopK(_blocks(keys), _BLOCK)),
    "mean-topk": Kind(_IN_BLOCKS, budget, lambda keys, heads: BlockTopK(_blocks(keys), _BLOCK)),
    # Small blocks and a choice for each head: what bounds tell is lost in blocks of 64.
    "bounds-topk": Kind(
        "keys a query reads, in blocks of 8",
        budget,
        lambda keys, heads: BlockTopK(
            max(1, keys // 8), 8, block_q=32, summary="bounds", share="head", recent=5
        ),
    ),
    "adaptive-topk": Kind(
        "keys a query reads on average, in blocks of 8; heads of a layer divide them",
        budget,
        lambda keys, heads: AdaptiveTopK(max(1, keys // 8), 8, block_q=32, recent=5),
    ),
    "vertical-slash": Kind(
        _IN_BLOCKS, budget, lambda keys, heads: VerticalSlash(_blocks(keys), _BLOCK)
    ),
    # Of the published block sides (32, 2) and coarser ones, these lost least on SmolLM2 at 25 %.
    "hip": Kind("keys a query reads, 128 of them its window", budget, lambda keys, _: _hip(keys)),
    "longheads": Kind("keys a query reads", budget, lambda keys, heads: _longheads(keys)),
    "cca": Kind(
        "keys in the window, besides one core token for 16 older keys",
        budget,
        lambda keys, heads: CCA(16, keys),
    ),
    "hyper": Kind(
        "keys a query reads, half of them samples; pieces of twice as many are exact",
        budget,
        lambda keys, heads: HyperAttention(keys // 2, keys // 2, min_len=2 * keys),
    ),
    # What serves SmolLM2 best of the options that its benchmark tries.
    "tidaldecode": Kind(
        "keys a layer shares in decoding; prefill is dense",
        budget,
        lambda keys, heads: TidalDecode(keys, correct=(9, 16, 23), share="all", own=True),
    ),
}
