"""Benchmarks: ``python -m benchmarks.NAME [--json]``.

A benchmark prints rows ``{"name", "ours", "theirs", "ratio", "bound", "note"}``: seconds of both
sides measured in one run, ``ratio`` theirs over ours, ``bound`` the ratio that the saved work would
allow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from regard import keep_memory

Benchmark = Callable[[], list[dict[str, Any]]]


def main(
    benchmarks: Sequence[Benchmark],
    optional: Mapping[str, Benchmark] | None = None,
    doc: str | None = None,
) -> None:
    """Run benchmarks and print their rows as a table, or as JSON with ``--json``.

    Args:
        benchmarks: functions that return rows, run in order.
        optional: further ones, each run when its ``--NAME`` is given.
        doc: text of ``--help``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", metavar="NAME", help="run the benchmarks whose name holds NAME")
    for name, benchmark in (optional or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=benchmark.__doc__)
    options = parser.parse_args()
    chosen = [
        *benchmarks,
        *(fn for name, fn in (optional or {}).items() if getattr(options, name)),
    ]
    if options.only is not None:
        chosen = [fn for fn in chosen if options.only in fn.__name__]
        if not chosen:
            parser.error(f"--only {options.only}: no benchmark has that in its name")
    keep_memory()  # for ours and theirs alike
    rows: list[dict[str, Any]] = []
    for at, benchmark in enumerate(chosen, 1):
        print(f"[{at}/{len(chosen)}] {benchmark.__name__}", file=sys.stderr)
        rows += benchmark()
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; ``share`` is the ratio as a share of its bound."""
    lines = [
        "| what | ours | theirs | ratio | bound | share | note |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        share = r["ratio"] / r["bound"] if r["ratio"] and r["bound"] else None
        cells = [
            r["name"],
            _time(r["ours"]),
            _time(r["theirs"]),
            "" if r["ratio"] is None else f"{r['ratio']:.2f}",
            "" if r["bound"] is None else f"{r['bound']:.2f}",
            "" if share is None else f"{share:.0%}",
            r["note"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
