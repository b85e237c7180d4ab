"""What ``regard compare`` prints in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(result: dict[str, Any]) -> Any:
    """The rows as rich tables that fit 80 signs: quality, cost, and the tasks where they were asked."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    rows = result["rows"]
    half = "" if result["spans_rule"] is None else " of the second half"
    words = (
        f"{result['model']}, {result['length']} tokens of {result['text']['name']}; unpatched "
        f"perplexity{half} {result['unpatched_ppl']:.4f}"
    )

    def one(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
        made = Table(
            title=escape(title), title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        made.add_column("method", overflow="fold")
        for heading in headings:
            made.add_column(heading, justify="right", no_wrap=True)
        for row, values in zip(rows, cells, strict=True):
            made.add_row(escape(row["method"]), *values)
        return made

    cells = [_cells(row) for row in rows]
    at = len(_QUALITY)
    shown: list[Any] = [
        one(words, _QUALITY, [values[:at] for values in cells]),
        one("cost", _COST, [values[at:] for values in cells]),
        escape(_caption(result)),
    ]
    if rows[0]["tasks"] is not None:
        shares = [[f"{share:.0%}" for share in row["tasks"].values()] for row in rows]
        shown.append(one("share of tasks answered exactly", list(rows[0]["tasks"]), shares))
    return Group(*shown)


_QUALITY = ("perplexity", "change", "agreement", "needles", "density")
_COST = ("prefill", "attention", "choosing", "speed-up", "bound", "decode/s", "memory")


def _cells(row: dict[str, Any]) -> list[str]:
    memory, bound = row["peak_mb"], row["bound"]
    return [
        f"{row['ppl']:.3f}{'*' if row['ahead'] else ''}",
        f"{row['ppl_change']:+.1%}",
        f"{row['agreement']:.1%}",
        "".join("●" if hit else "○" for hit in row["needle"].values()),
        "" if row["density"] is None else f"{row['density']:.1%}",
        f"{row['prefill_s']:.1f} s",
        f"{row['attention_s']:.2f} s",
        f"{row['choosing_s']:.2f} s",
        f"{row['attention_speedup']:.2f}x",
        "" if bound is None else f"{bound:.2f}x",
        f"{row['decode_tok_s']:.1f}",
        "" if memory is None else f"{memory:.0f} MB",
    ]


def _caption(result: dict[str, Any]) -> str:
    depths = ", ".join(f"{float(depth):.0%}" for depth in result["rows"][0]["needle"])
    words = (
        f"needles at {depths} of the text (● found); density: pairs against dense causal; "
        f"attention: seconds, choosing where to look included; its speed-up, and the bound that "
        f"the pairs of the listed blocks set; on "
        f"{result['machine']['processor']}, {result['machine']['threads']} threads"
    )
    if result["spans_rule"] is None:
        return words
    words += (
        f". For steering methods {result['spans_rule']}; perplexity, change and agreement of every "
        "method are those of the answer"
    )
    if any(row["ahead"] for row in result["rows"]):
        words += ". * rows of the answer depend on later tokens: no perplexity of a prediction"
    return words
