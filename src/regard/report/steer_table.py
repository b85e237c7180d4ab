"""What ``regard steer`` prints in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..bench.steer_names import others
from ..bench.steering import summary


def steer_table(result: Mapping[str, Any]) -> RenderableType:
    """Both answers side by side, the next-token distributions, and the mass by span."""
    before, after = result["before"], result["after"]
    answers = Table(show_lines=False, expand=False)
    answers.add_column("as it is", overflow="fold", ratio=1)
    answers.add_column(result["method"]["name"], overflow="fold", ratio=1)
    answers.add_row(Text(before["text"]), Text(after["text"]))
    answers.add_section()
    for one, other in zip(before["top"], after["top"], strict=True):
        answers.add_row(*(Text(f"{x['p']:6.1%}  {x['token']!r}") for x in (one, other)))
    shown: list[RenderableType] = [answers]
    if result["mass"] is not None:
        mass = Table(title="mass of the last row, mean over layers", title_justify="left", box=None)
        for name in ("span", "before", "after"):
            mass.add_column(name, justify="left" if name == "span" else "right")
        for span, x in result["mass"].items():
            mean = (f"{sum(x[side]) / len(x[side]):.1%}" for side in ("before", "after"))
            mass.add_row(Text(span), *mean)
        shown += [Text(), mass]
    shown += [Text(), Text("\n".join(summary(result)))]
    return Group(*shown)


def methods_table(known: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Names, papers and settings of all steering methods, and what steers without being one."""
    table = Table(box=None)
    for name in ("method", "arXiv", "settings", "paper"):
        table.add_column(name, overflow="fold")
    for row in known:
        settings = ", ".join(
            key if default is None else f"{key}={default}"
            for key, default in row["settings"].items()
        )
        table.add_row(row["name"], row["arxiv"], Text(settings), Text(row["title"]))
    loose = others()
    if not loose:
        return table
    rest = Table(title="not one patch:", title_justify="left", box=None)
    for name in ("system", "arXiv", "entry", "what it is"):
        rest.add_column(name, overflow="fold")
    for row in loose:
        rest.add_row(row["name"], row["arxiv"], Text(row["entry"]), Text(row["what"]))
    return Group(table, Text(), rest)
