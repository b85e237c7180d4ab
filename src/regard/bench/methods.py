"""The methods that ``regard compare`` knows by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ..core.masks import Causal, Dilated, Mask, Sinks, SlidingWindow, Strided


@dataclass(frozen=True)
class Named:
    """A method with the name that tables show.

    Attributes:
        name: such as ``streaming:1024``.
        mask: where a query may look, the model's own causality included.
    """

    name: str
    mask: Mask


def _window(width: int) -> Mask:
    return Causal() & SlidingWindow(width - 1)


def _streaming(width: int) -> Mask:
    return Causal() & (SlidingWindow(width - 1) | Sinks(4))


def _dilated(width: int) -> Mask:
    return Causal() & (Dilated(width // 2 - 1, 2) | Sinks(4))


def _strided(stride: int) -> Mask:
    return Causal() & (SlidingWindow(stride) | Strided(stride) | Sinks(4))


# name -> (what its number means, default number at a length, mask of that number)
KNOWN: dict[str, tuple[str, Callable[[int], int], Callable[[int], Mask]]] = {
    "full": ("nothing", lambda n: 0, lambda _: Causal()),
    "window": ("keys in the window", lambda n: max(4, n // 4), _window),
    "streaming": ("keys in the window, besides 4 sinks", lambda n: max(4, n // 4), _streaming),
    "dilated": (
        "keys' reach, every second one, besides 4 sinks",
        lambda n: max(4, n // 2),
        _dilated,
    ),
    "strided": ("stride and local window, besides 4 sinks", lambda n: max(2, n // 32), _strided),
}


def method(text: str | Mask, length: int) -> Named:
    """A method by its name, ``NAME`` or ``NAME:NUMBER``, or any mask.

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
    return Named(name if name == "full" else f"{name}:{value}", make(value))
