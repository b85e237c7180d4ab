"""The card that every system's file carries: what it is, where it starts, what proves it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["green", "partial", "planned"]

PROOFS = ("definition", "oracle", "claim", "cost")


@dataclass(frozen=True)
class Card:
    """One system of the catalog, written as ``CARD = Card(...)`` in the system's file.

    Its arguments are literals, so that the catalog reads a card without importing the file.

    Attributes:
        key: the system's key in ``data/systems.tsv``.
        title: title of the paper.
        arxiv: arXiv id, ``"2505.12044"``.
        family: family of the system in ``data/systems.tsv``.
        entry: where to start, ``"module:name"``.
        definition: proof that the fast form agrees with the paper's equations in float64.
        oracle: proof that it agrees with something that this project did not write.
        claim: command or test that reproduces one claim of the paper.
        cost: command or test that shows the growth of its cost with the length.
        note: anything that a reader should know, in a sentence.

    A proof is a test id (``tests/patterns/test_x.py::test_y``) or a command
    (``python -m benchmarks.x``); ``None`` while it is missing.
    """

    key: str
    title: str
    arxiv: str
    family: str
    entry: str
    definition: str | None = None
    oracle: str | None = None
    claim: str | None = None
    cost: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("key", "title", "arxiv", "family", "entry"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"Card {self.key!r}: {name} must be a text, got {value!r}")
        module, _, attribute = self.entry.partition(":")
        if not module or not attribute:
            raise ValueError(f"Card {self.key!r}: entry must be 'module:name', got {self.entry!r}")

    @property
    def missing(self) -> tuple[str, ...]:
        """The proofs that are still missing."""
        return tuple(name for name in PROOFS if not getattr(self, name))

    @property
    def state(self) -> State:
        """``green`` with all four proofs, else ``partial``: a system with a card has its code."""
        return "partial" if self.missing else "green"

    def resolve(self) -> Any:
        """The object that ``entry`` names. Imports its module."""
        module, _, attribute = self.entry.partition(":")
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The card as plain data, with its state."""
        return {**asdict(self), "state": self.state}
