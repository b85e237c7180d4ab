"""The methods that ``regard compare`` knows by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.masks import Causal, Dilated, Mask, Sinks, SlidingWindow, Strided
from ..core.select import Selector
from ..models.method import Method
from ..models.select_method import SelectMethod
from ..patterns.power import Power
from ..patterns.s2_pattern import S2
from .calibrated import CALIBRATED
from .method_text import called
from .selecting import SELECTING, Heads, How, Kind, budget
from .steer_names import build, entry, steers, unknown


@dataclass(frozen=True)
class Named:
    """A way of attending with the name that tables show.

    Attributes:
        name: such as ``streaming:1024`` or ``gift(alpha=3.0)``.
        how: a mask (the model's own causality included), a selector or a method.
        steers: it is a steering method, which works on spans of a prompt.
        entry: where a steering method that was named stands, ``"module:class"``.
    """

    name: str
    how: How
    steers: bool = False
    entry: str | None = None


# Heads of the default model, SmolLM2-135M.
SMOLLM2 = Heads(9, 3)
# A pass of at most so many tokens is a question or a decoding step.
FEW = 64


def _quarter(length: int) -> int:
    return max(4, length // 4)


def _window(width: int) -> Mask:
    return Causal() & SlidingWindow(width - 1)


def _streaming(width: int) -> Mask:
    return Causal() & (SlidingWindow(width - 1) | Sinks(4))


def _dilated(width: int) -> Mask:
    return Causal() & (Dilated(width // 2 - 1, 2) | Sinks(4))


def _strided(stride: int) -> Mask:
    return Causal() & (SlidingWindow(stride) | Strided(stride) | Sinks(4))


def _s2(block: int, heads: Heads) -> Mask:
    # The shards of the key heads must cover the context: there are no more of them than key heads.
    stride = min(8, heads.kv)
    if stride < 2:
        raise ValueError(
            "compare: method s2 shards the context among key heads, but the model has only one"
        )
    return Causal() & (S2(heads.query, block, 4, stride, heads.kv) | Sinks(4))


# Names of masks. Those of selectors and other methods stand in selecting.py.
_MASKS = {
    "full": Kind("nothing", lambda n: 0, lambda _, heads: Causal()),
    "window": Kind("keys in the window", _quarter, lambda width, heads: _window(width)),
    "streaming": Kind(
        "keys in the window, besides 4 sinks", _quarter, lambda width, heads: _streaming(width)
    ),
    "dilated": Kind(
        "keys' reach, every second one, besides 4 sinks",
        lambda n: max(4, n // 2),
        lambda reach, heads: _dilated(reach),
    ),
    "strided": Kind(
        "stride and local window, besides 4 sinks",
        lambda n: max(2, n // 32),
        lambda stride, heads: _strided(stride),
    ),
    # The paper's 256 tokens a block are meant for 32,768: 128 blocks. 64 blocks still show the powers.
    "power": Kind(
        "tokens a block; window of 5 blocks, 1 sink",
        lambda n: max(1, n // 64),
        lambda block, heads: Power(block),
    ),
    "s2": Kind(
        "tokens a block; window of 4 blocks, besides 4 sinks", lambda n: max(1, n // 64), _s2
    ),
}
KNOWN: dict[str, Kind] = {**_MASKS, **SELECTING}


def _calibrated(name: str, file: str, length: int) -> How:
    """A method of what was calibrated for a model."""
    if name not in CALIBRATED:
        raise ValueError(
            f"compare: {name!r} reads no file; those that do are {', '.join(CALIBRATED)}"
        )
    what, make = CALIBRATED[name]
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"compare: method {name!r} needs its {what}; there is no {path}")
    return make(path, budget(length))


def _steering(text: str) -> Named:
    """A steering method, ``NAME`` or ``NAME(KEY=VALUE, ...)``."""
    name, settings = called(text)
    if name in KNOWN or name in CALIBRATED:
        raise ValueError(
            f"compare: {text!r}: settings in brackets are for steering methods; a number of {name} "
            "stands after a colon, a file after an @"
        )
    where = entry(name)
    if where is None:
        raise ValueError(f"compare: {unknown(name, (*KNOWN, *CALIBRATED))}")
    how = build(name, settings, "compare")
    return Named(f"{name}({', '.join(settings)})" if settings else name, how, True, where)


def method(text: str | How, length: int, heads: Heads = SMOLLM2) -> Named:
    """A method by its name, ``NAME``, ``NAME:NUMBER`` or ``NAME@FILE``, a steering method by
    ``NAME`` or ``NAME(KEY=VALUE, ...)``, or any mask, selector or method.

    A selector's name may end in ``:prefill``: it chooses for the prompt, and questions and decoding
    steps, which cost little, stay dense.

    Args:
        text: the name, or what has none, which is taken as it is.
        length: number of tokens, which default numbers depend on.
        heads: of the model; only per-head patterns (``s2``) depend on it. A mask made for other
            heads than the model's is refused when it is used.

    Raises:
        ValueError: the name is unknown, or the number or a setting is not one that fits it.
    """
    if not isinstance(text, str):
        return Named(repr(text), text, isinstance(text, Method) and steers(text))
    if "(" in text:
        return _steering(text)
    name, at, file = text.partition("@")
    if at and entry(name) is not None:
        raise ValueError(f"compare: {text!r}: write the file in brackets, {name}(file={file})")
    if at:
        return Named(text, _calibrated(name, file, length))
    stem = text.removesuffix(":prefill")
    name, _, number = stem.partition(":")
    if name not in KNOWN:
        if name in CALIBRATED:
            raise ValueError(
                f"compare: method {name!r} needs its {CALIBRATED[name][0]}: write {name}@FILE"
            )
        if number and entry(name) is not None:
            raise ValueError(f"compare: {text!r}: write settings in brackets, {name}(KEY=VALUE)")
        return _steering(name)
    kind = KNOWN[name]
    if not number:
        value = kind.default(length)
    elif kind.meaning == "nothing" or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"compare: method {text!r}: after the colon stands a positive whole number ({kind.meaning})"
        )
    else:
        value = int(number)
    how = kind.make(value, heads)
    shown = name if name == "full" else f"{name}:{value}"
    if stem == text:
        return Named(shown, how)
    if not isinstance(how, Selector):
        choosing = [one for one, k in KNOWN.items() if isinstance(k.make(64, heads), Selector)]
        raise ValueError(
            f"compare: method {text!r}: only selectors leave questions and decoding dense: "
            f"{', '.join(choosing)}"
        )
    return Named(f"{shown}:prefill", SelectMethod(how, decode=False, few=FEW))
