"""The methods that ``regard compare`` knows by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ..core.masks import Causal, Dilated, Mask, Sinks, SlidingWindow, Strided
from ..patterns.power import Power
from ..patterns.s2_pattern import S2


@dataclass(frozen=True)
class Named:
    """A method with the name that tables show.

    Attributes:
        name: such as ``streaming:1024``.
        mask: where a query may look, the model's own causality included.
    """

    name: str
    mask: Mask


@dataclass(frozen=True)
class Heads:
    """What a pattern that differs between heads needs to know of a model.

    Attributes:
        query: query heads of a layer.
        kv: key heads, a divisor of ``query``.
    """

    query: int
    kv: int


# Heads of the default model, SmolLM2-135M.
SMOLLM2 = Heads(9, 3)


def _window(width: int) -> Mask:
    return Causal() & SlidingWindow(width - 1)


def _streaming(width: int) -> Mask:
    return Causal() & (SlidingWindow(width - 1) | Sinks(4))


def _dilated(width: int) -> Mask:
    return Causal() & (Dilated(width // 2 - 1, 2) | Sinks(4))


def _strided(stride: int) -> Mask:
    return Causal() & (SlidingWindow(stride) | Strided(stride) | Sinks(4))


def _power(block: int) -> Mask:
    return Power(block)


def _s2(block: int, heads: Heads) -> Mask:
    # The shards of the key heads must cover the context: there are no more of them than key heads.
    stride = min(8, heads.kv)
    if stride < 2:
        raise ValueError(
            "compare: method s2 shards the context among key heads, but the model has only one"
        )
    return Causal() & (S2(heads.query, block, 4, stride, heads.kv) | Sinks(4))


def _shared(make: Callable[[int], Mask]) -> Callable[[int, Heads], Mask]:
    return lambda number, heads: make(number)


# name -> (what its number means, default number at a length, mask of that number)
KNOWN: dict[str, tuple[str, Callable[[int], int], Callable[[int, Heads], Mask]]] = {
    "full": ("nothing", lambda n: 0, _shared(lambda _: Causal())),
    "window": ("keys in the window", lambda n: max(4, n // 4), _shared(_window)),
    "streaming": (
        "keys in the window, besides 4 sinks",
        lambda n: max(4, n // 4),
        _shared(_streaming),
    ),
    "dilated": (
        "keys' reach, every second one, besides 4 sinks",
        lambda n: max(4, n // 2),
        _shared(_dilated),
    ),
    "strided": (
        "stride and local window, besides 4 sinks",
        lambda n: max(2, n // 32),
        _shared(_strided),
    ),
    # The paper's 256 tokens a block are meant for 32,768: 128 blocks. 64 blocks still show the powers.
    "power": (
        "tokens a block; window of 5 blocks, 1 sink",
        lambda n: max(1, n // 64),
        _shared(_power),
    ),
    "s2": (
        "tokens a block; window of 4 blocks, besides 4 sinks",
        lambda n: max(1, n // 64),
        _s2,
    ),
}


def method(text: str | Mask, length: int, heads: Heads = SMOLLM2) -> Named:
    """A method by its name, ``NAME`` or ``NAME:NUMBER``, or any mask.

    Args:
        text: the name, or a mask, which is taken as it is.
        length: number of tokens, which default numbers depend on.
        heads: of the model; only per-head patterns (``s2``) depend on it. A mask made for other
            heads than the model's is refused when it is used.

    Raises:
        ValueError: the name is unknown or the number is not one that fits it.
    """
    if isinstance(text, Mask):
        return Named(repr(text), text)
    name, _, number = text.partition(":")
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KNOWN)}"
        raise ValueError(f"compare: unknown method {name!r}; {hint}")
    meaning, default, make = KNOWN[name]
    if not number:
        value = default(length)
    elif meaning == "nothing" or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"compare: method {text!r}: after the colon stands a positive whole number ({meaning})"
        )
    else:
        value = int(number)
    return Named(name if name == "full" else f"{name}:{value}", make(value, heads))
