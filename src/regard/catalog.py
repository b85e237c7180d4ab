"""What exists, where, and with what evidence: the list of systems joined with their cards."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from .card import Card, State
from .data import read

FAMILY_PACKAGES = (
    "patterns",
    "sparse",
    "linear",
    "layers",
    "vision",
    "probe",
    "steer",
    "diffusion",
    "train",
    "study",
    "tasks",
    "bench",
    "distributed",
)
STATES: tuple[State, ...] = ("green", "partial", "planned")


@dataclass(frozen=True)
class Entry:
    """One row of the catalog; ``card`` is ``None`` for a system that is only planned."""

    key: str
    family: str
    title: str
    card: Card | None = None

    @property
    def state(self) -> State:
        return "planned" if self.card is None else self.card.state

    def as_dict(self) -> dict[str, Any]:
        """Plain data: key, family, title, state, entry point, and the evidence if there is any."""
        row: dict[str, Any] = {"entry": None}
        if self.card is not None:
            row = self.card.as_dict()
        row.update(key=self.key, family=self.family, title=self.title, state=self.state)
        return row


@lru_cache(maxsize=1)
def systems() -> tuple[Entry, ...]:
    """The systems of ``data/systems.tsv`` in the order of the file, without their cards."""
    head, *lines = read("systems.tsv").splitlines()
    if head.split("\t") != ["key", "family", "title"]:
        raise ValueError(f"systems.tsv: expected the columns key, family, title, got {head!r}")
    return tuple(Entry(key, family, title) for key, family, title in map(_fields, lines))


def _fields(line: str) -> list[str]:
    return line.split("\t")


def cards(root: Path | None = None) -> dict[str, Card]:
    """Every ``CARD`` of the family packages, by key.

    A card is read from the source of its file: nothing is imported, so that the catalog is quick
    and also lists systems whose extras are not installed here.

    Args:
        root: the folder that holds the family packages, by default this package's own.

    Raises:
        ValueError: a card is not made of literals, or two files carry the same key.
    """
    found: dict[str, Card] = {}
    origin: dict[str, Path] = {}
    root = Path(__file__).parent if root is None else root
    for package in FAMILY_PACKAGES:
        for path in sorted(root.joinpath(package).rglob("*.py")):
            card = _card_in(path)
            if card is None:
                continue
            if card.key in found:
                raise ValueError(f"{path}: the key {card.key!r} is already in {origin[card.key]}")
            found[card.key], origin[card.key] = card, path
    return found


def catalog(family: str | None = None, state: str | None = None) -> list[Entry]:
    """All systems with their cards, in the order of the list.

    Args:
        family: only this family (``"sparse"``, ``"vision"``, ...).
        state: only ``"green"``, ``"partial"`` or ``"planned"``.

    Raises:
        ValueError: an unknown family or state, or a card whose key is not in the list.
    """
    listed = systems()
    _known("family", family, sorted({entry.family for entry in listed}))
    _known("state", state, STATES)
    by_key = cards()
    for key in by_key.keys() - {entry.key for entry in listed}:
        raise ValueError(f"catalog: the card {key!r} has no row in systems.tsv")
    rows = [Entry(e.key, e.family, e.title, by_key.get(e.key)) for e in listed]
    return [
        row
        for row in rows
        if (family is None or row.family == family) and (state is None or row.state == state)
    ]


def find(key: str) -> Entry:
    """The row of one system.

    Raises:
        ValueError: no system has this key; the message names the closest ones.
    """
    rows = {entry.key: entry for entry in catalog()}
    if key not in rows:
        close = get_close_matches(key, rows, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `regard catalog` lists all"
        raise ValueError(f"catalog: there is no system {key!r}{hint}")
    return rows[key]


def _known(what: str, value: str | None, allowed: Iterable[str]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"catalog: unknown {what} {value!r}, expected one of {', '.join(allowed)}")


def _card_in(path: Path) -> Card | None:
    source = path.read_text(encoding="utf-8")
    if "CARD" not in source:
        return None
    for node in ast.parse(source, filename=str(path)).body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        if "CARD" in names and node.value is not None:
            return _card_from(node.value, path)
    return None


def _card_from(node: ast.expr, path: Path) -> Card:
    if not isinstance(node, ast.Call):
        raise ValueError(f"{path}: CARD must be written as CARD = Card(...)")
    try:
        args = [ast.literal_eval(arg) for arg in node.args]
        named = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except ValueError as error:
        raise ValueError(f"{path}: the arguments of CARD must be literals ({error})") from error
    try:
        return Card(*args, **named)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
