"""Tables for the terminal, from the plain data that the commands can also print as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..card import PROOFS
from ..catalog import STATES, Entry

_COLOURS = {
    "green": "green",
    "partial": "yellow",
    "planned": "dim",
    "works": "green",
    "not run": "dim",
    "unavailable": "dim",
    "wrong": "bold red",
    "fails": "bold red",
}


def catalog_table(rows: list[Entry]) -> RenderableType:
    """The catalog, one system a line, with the count of each state below."""
    table = _table(("key", "family", "state", "title"))
    for row in rows:
        table.add_row(Text(row.key), row.family, _state(row.state), Text(row.title))
    counts = ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in STATES)
    return Group(table, Text(f"\n{len(rows)} systems: {counts}"))


def card_table(row: Entry) -> RenderableType:
    """Everything about one system."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("title", Text(row.title))
    table.add_row("family", row.family)
    table.add_row("state", _state(row.state))
    if row.card is not None:
        table.add_row("arXiv", row.card.arxiv)
        table.add_row("entry", Text(row.card.entry))
        for proof in PROOFS:
            table.add_row(proof, Text(getattr(row.card, proof) or "missing"))
        if row.card.note:
            table.add_row("note", Text(row.card.note))
    return Group(Text(row.key, style="bold"), table)


def doctor_tables(found: dict[str, Any]) -> RenderableType:
    """The doctor's findings: versions and machine, backends, typical calls."""
    versions = "  ".join(
        f"{name} {text or '(missing)'}" for name, text in _split(found["versions"])
    )
    here = found["machine"]
    gpus = ", ".join(here["gpus"]) or "none"
    machine = (
        f"{here['system']}, {here['processor']}, {here['instructions']}, {here['cores']} cores, "
        f"{here['threads']} threads in PyTorch, GPU: {gpus}"
    )
    backends = _table(("backend", "state", "why"))
    for row in found["backends"]:
        why = row["why"] or f"agrees with the definition, largest error {row['error']:.0e}"
        backends.add_row(row["name"], _state(row["state"]), Text(why))
    calls = _table(("a call like", "auto picks", "work", "because"))
    for row in found["calls"]:
        share = "" if row["density"] is None else f"{row['density']:.1%}"
        calls.add_row(Text(row["call"]), row["backend"], share, Text(row["reason"]))
    memory = found["memory"]
    pages = (
        f"64 MB of new memory take {memory['new_ms']:.0f} ms to fill, of kept memory "
        f"{memory['kept_ms']:.0f} ms"
    )
    if memory["new_ms"] > 3 * memory["kept_ms"]:
        pages += "; regard.keep_memory() keeps it"
    lines = (Text(versions), Text(machine), Text(pages), Text(""))
    return Group(*lines, backends, Text(""), calls)


def _split(versions: dict[str, str | None]) -> list[tuple[str, str | None]]:
    return sorted(versions.items(), key=lambda item: item[1] is None)


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("key", "backend", "state"))
    return table


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS[state])
