"""Steering methods by name: those of the catalog that are one :class:`Method` with knobs."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from ..card import Card
from ..catalog import cards
from ..models.method import Method
from .method_text import literal

# Layers that depend on a model's depth are tried on this one.
_DEPTH = 32


def known() -> list[dict[str, Any]]:
    """Name, paper and settings (with defaults) of every method, as plain data."""
    return [
        {
            "name": name,
            "title": card.title,
            "arxiv": card.arxiv,
            "settings": {
                key: None
                if parameter.default is inspect.Parameter.empty
                else repr(parameter.default)
                for key, parameter in _parameters(kind).items()
            },
        }
        for name, (card, kind) in _methods().items()
    ]


def others() -> list[dict[str, Any]]:
    """The catalog's steering systems that are no method: loops, processors of logits, layers. Name,
    paper, entry and what that is, as plain data."""
    return [
        {
            "name": name,
            "title": card.title,
            "arxiv": card.arxiv,
            "entry": card.entry,
            "what": (inspect.getdoc(_entry(card)) or "").partition("\n")[0],
        }
        for name, card in cards().items()
        if card.family == "steer" and name not in _methods()
    ]


def every() -> list[dict[str, Any]]:
    """All steering systems as plain data, methods first: what :func:`known` says of them (``settings``
    is ``None`` where there are none to give), and ``why_not``, why no command takes this one by its
    name; ``None`` where it does."""
    methods = [{**row, "why_not": _one_model(row["name"])} for row in known()]
    systems = [
        {key: row[key] for key in ("name", "title", "arxiv")}
        | {"settings": None, "why_not": _not_one_patch(row)}
        for row in others()
    ]
    return methods + systems


def _not_one_patch(row: dict[str, Any]) -> str:
    """What a row of :func:`others` is instead."""
    return f"not one patch but {row['entry']} ({row['what'].rstrip('.')})"


def _one_model(name: str) -> str | None:
    """Why a method cannot be made from text; ``None`` if it can."""
    card, kind = _methods()[name]
    if "model" not in _parameters(kind):
        return None
    return f"made for one loaded model, which no setting can name; use {card.entry} in Python"


def steers(how: object) -> bool:
    """Whether this is a steering method of the catalog, which works on spans of a prompt."""
    return isinstance(how, tuple(kind for _, kind in _methods().values()))


def entry(name: str) -> str | None:
    """Where a method stands, ``"module:class"``; ``None`` where no method has this name."""
    found = _methods().get(name)
    return None if found is None else found[0].entry


def build(name: str, settings: Sequence[str], who: str = "steer") -> Method:
    """A method from its name and ``KEY=VALUE`` settings.

    Values are Python literals (numbers, texts, tuples, lists); what is none is a text. A method that
    reads what was calibrated takes its file as ``file=PATH``.

    Args:
        name: key of the catalog.
        settings: each ``KEY=VALUE``.
        who: the command that asks, ``"steer"`` or ``"compare"``; messages speak its language.

    Raises:
        ValueError: an unknown method or key, a missing one, or values that the method refuses.
        FileNotFoundError: there is no such file.
    """
    flag = "--set " if who == "steer" else ""
    found = _methods()
    if name not in found:
        raise ValueError(f"{who}: {unknown(name)}")
    kind = found[name][1]
    allowed = _parameters(kind)
    why_not = _one_model(name)
    if why_not is not None:
        raise ValueError(f"{who}: {name} is {why_not} (regard catalog {name} tells more)")
    given: dict[str, Any] = {}
    file = None
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not key:
            raise ValueError(
                f"{who}: {flag or f'{name} in brackets '}takes KEY=VALUE, got {setting!r}"
            )
        if key == "file" and hasattr(kind, "load"):
            file = value
        elif key not in allowed:
            raise ValueError(f"{who}: {name} has no setting {key!r}; it has {', '.join(allowed)}")
        else:
            given[key] = literal(value)
    missing = [
        key
        for key, parameter in allowed.items()
        if parameter.default is inspect.Parameter.empty and key not in given
    ]
    if missing and file is None:
        source = " or file=PATH" if hasattr(kind, "load") else ""
        raise ValueError(f"{who}: {name} needs {flag}{missing[0]}=VALUE{source}")
    return _made(kind, given, file, f"{who}: {name}")


def unknown(name: str, besides: Iterable[str] = ()) -> str:
    """What is to be said of a name that no method has.

    Args:
        name: what was typed.
        besides: further names that would have been possible.
    """
    for row in others():
        if row["name"] == name:
            return f"{name} is {_not_one_patch(row)}; regard catalog {name} tells more"
    names = [*besides, *_methods()]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
    return f"unknown method {name!r}; {hint}"


def _made(kind: type[Method], given: dict[str, Any], file: str | None, who: str) -> Method:
    """The method, its edits tried out, so that values of a wrong kind show before a model is loaded."""
    from safetensors import SafetensorError

    try:
        if file is None:
            made = kind(**given)
        else:
            made = kind.load(file)  # type: ignore[attr-defined]
            made = dataclasses.replace(made, **given) if given else made  # type: ignore[type-var]
        for edit in made.edits():
            layers = edit.of_depth(_DEPTH).layers
            if not callable(layers):
                sorted(layers or ())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{who} reads a file, but there is no {file}") from error
    except SafetensorError as error:
        raise ValueError(f"{who}: {file} cannot be read as safetensors: {error}") from error
    except (TypeError, AttributeError) as error:
        values = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{who} cannot be made with {values}: {error}") from error
    return made


def _parameters(kind: type[Method]) -> dict[str, inspect.Parameter]:
    every = inspect.signature(kind).parameters
    # Which model something was made for is said by its file, not by its user.
    return {key: one for key, one in every.items() if key != "made_for"}


def _entry(card: Card) -> Any:
    module, _, name = card.entry.partition(":")
    return getattr(import_module(module), name)


@lru_cache(maxsize=1)
def _methods() -> dict[str, tuple[Card, type[Method]]]:
    """The catalog's steering methods whose entry is a method's class, by key."""
    found = {}
    for key, card in cards().items():
        if card.family != "steer":
            continue
        entry = _entry(card)
        if isinstance(entry, type) and issubclass(entry, Method):
            found[key] = card, entry
    return found
