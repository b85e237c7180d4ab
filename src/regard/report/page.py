"""The self-contained HTML report of ``regard compare``: one file, no script, no outside address."""

from __future__ import annotations

import math
from base64 import b64encode
from pathlib import Path
from typing import Any

from ..core.masks import Mask
from . import charts
from .mask_text import parse_mask
from .pictures import mask_tile

# A sparse method counts as harmless up to this change of the perplexity.
HARMLESS = 0.10
RUINOUS = 0.50


def render(result: dict[str, Any]) -> str:
    """The report of one comparison as HTML.

    Args:
        result: what :func:`regard.bench.compare.run` returns. ``ppl_change`` is a fraction (0.02
            for 2 % worse than dense), ``agreement`` a share, ``density`` the pairs against dense
            attention, ``bound`` the speed-up that the saved pairs allow. A value that was not
            measured is ``None``. ``spans``, ``ahead`` and ``spans_rule`` are those of steering methods.
    """
    from .templates import template

    rows = [
        {
            "spans": None,
            "ahead": None,
            **row,
            "colour": charts.colour(at),
            "picture": _picture(row["mask"], result["length"]),
        }
        for at, row in enumerate(result["rows"])
    ]
    return template("page.html", number=number, percent=percent, change=change).render(
        result=result,
        rows=rows,
        depths=_depths(result["rows"]),
        tasks=list(result["rows"][0]["tasks"] or ()),
        findings=findings(result["rows"]),
        machine=machine_words(result["machine"]),
        plots=_plots(result["rows"]),
        widest=_widest(result["rows"]),
        attention=_attention(result),
        rule=result.get("spans_rule"),
    )


def write(result: dict[str, Any], path: str | Path) -> Path:
    """Write the report to a file and return its path."""
    path = Path(path)
    path.write_text(render(result), encoding="utf-8")
    return path


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in a sentence or two."""
    # A steering method that reads all pairs, or more of them, is no sparse one.
    sparse = [row for row in rows if not row.get("spans")]
    sparse = [row for row in sparse if _finite(row["ppl_change"]) and _finite(row["density"])]
    densest = max((row["density"] for row in sparse), default=0.0)
    sparse = [row for row in sparse if row["density"] < densest]
    said = []
    kept = min(
        (row for row in sparse if row["ppl_change"] <= HARMLESS),
        key=lambda row: row["density"],
        default=None,
    )
    if kept is not None:
        share = kept["density"] / densest
        if kept["ppl_change"] > 0:
            price = f"for {kept['ppl_change']:.1%} more perplexity"
        else:
            price = "without any loss in perplexity"
        said.append(f"{kept['method']} computes {share:.0%} of the dense pairs {price}.")
    worst = max(sparse, key=lambda row: row["ppl_change"], default=None)
    if worst is not None and worst["ppl_change"] > RUINOUS:
        said.append(
            f"{worst['method']} does not hold: {worst['ppl_change'] + 1:,.1f} times the perplexity."
        )
    return said


def number(value: float | None, digits: int = 2) -> str:
    """A figure for the table, a dash where nothing was measured."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{value:.{digits}%}" if value is not None and math.isfinite(value) else number(value)


def change(value: float | None) -> str:
    """A relative change: signed per cent while it is small, a factor when it is not."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value > 2:
        return f"×{number(value + 1, 1)}"
    return f"{value:+.1%}" if abs(value) >= 0.0005 else "0 %"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _picture(text: str, length: int) -> str | None:
    """The mask's stencil as base64; ``None`` for what has no mask, chosen from the content."""
    try:
        mask: Mask = parse_mask(text)
    except ValueError:
        return None
    return b64encode(mask_tile(mask, length)).decode("ascii")


def _depths(rows: list[dict[str, Any]]) -> list[str]:
    return sorted({depth for row in rows for depth in row["needle"]}, key=float)


def machine_words(found: dict[str, Any]) -> str:
    """What a machine is, in a line."""
    words = []
    for name, value in found.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if value not in (None, "", False):
            words.append(f"{name.replace('_', ' ')}: {value}")
    return " · ".join(words)


def _plots(rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    def points(cost: str, factor: float = 1.0) -> list[tuple[str, float, float]]:
        nan = float("nan")
        return [
            (
                row["method"],
                nan if row[cost] is None else row[cost] * factor,
                nan if row["ppl"] is None else row["ppl"],
            )
            for row in rows
        ]

    dense = next((row for row in rows if row["ppl_change"] == 0), None)
    level = None if dense is None else (f"{dense['method']} attention", dense["ppl"])
    costs = (
        ("the pairs computed", points("density", 100), "pairs computed, % of dense attention"),
        ("the time spent in attention", points("attention_s"), "attention in one prefill, s"),
    )
    return [
        (f"Perplexity against {words}", charts.scatter(spots, label, "perplexity", level))
        for words, spots, label in costs
    ]


def _widest(rows: list[dict[str, Any]]) -> float:
    """The scale of the speed bars: the largest speed-up or bound."""
    values = [row[key] for row in rows for key in ("attention_speedup", "bound")]
    return max((value for value in values if _finite(value)), default=1.0)


def _attention(result: dict[str, Any]) -> dict[str, Any] | None:
    """Curves and heat maps of where the attention went; ``None`` where it was not recorded."""
    order = [row["method"] for row in result["rows"]]
    seen = {name: result["attention"][name] for name in order if name in result["attention"]}
    if not seen:
        return None
    at = {name: order.index(name) for name in seen}
    bins = max((_bins(found) for found in seen.values()), key=len)
    lines: list[tuple[str, list[float]]] = [
        (name, [100 * v for v in seen[name]["mass_by_distance"]] if name in seen else [])
        for name in order
    ]
    read = {found["tokens"] for found in seen.values() if "tokens" in found}
    top = max(
        (v for f in seen.values() for row in f["sinks"] for v in row if math.isfinite(v)), default=0
    )
    return {
        "curves": charts.curves(lines, bins, "distance to the key, tokens", "attention, %"),
        "heats": [
            (name, charts.colour(at[name]), charts.heat(found["sinks"], top, name))
            for name, found in seen.items()
        ],
        "top": top,
        "read": max(read, default=result["length"]),
    }


def _bins(found: dict[str, Any]) -> list[str]:
    """Names of the distance bins: ``edges[b] <= distance < edges[b + 1]``, the last one open."""
    edges = [int(edge) for edge in found["distance_edges"]]
    count = len(found["mass_by_distance"])
    if len(edges) not in (count, count + 1):
        raise ValueError(f"report: {len(edges)} distance edges do not fit {count} bins")
    names = []
    for at in range(count):
        low = edges[at]
        if at + 1 == len(edges):
            names.append(f"{low}+")
        elif edges[at + 1] - low <= 1:
            names.append(f"{low}")
        else:
            names.append(f"{low}–{edges[at + 1] - 1}")
    return names
