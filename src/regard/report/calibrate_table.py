"""What ``regard calibrate`` prints in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Found: TypeAlias = Mapping[str, Any]
# Rows that are printed; --json has them all.
_MOST = 20


def calibrate_table(result: Mapping[str, Any]) -> RenderableType:
    """What was found, and where it was written."""
    read, found = result["read"], result["found"]
    what = "the prompt" if "prompt" in read else f"the text {read['text']}"
    shown, said = _SHOWN[result["name"]](found)
    lines = [
        f"{result['name']} on {result['model']}, {read['tokens']} tokens of {what}",
        *said,
        f"{result['file']}: {result['bytes']} bytes. It is used by",
    ]
    return Group(Text(lines[0]), shown, *(Text(line) for line in lines[1:]))


def known_table(known: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What can be calibrated, what each reads, and its settings."""
    table = Table(box=None, padding=(0, 1, 1, 0))
    for name in ("method", "arXiv", "reads", "settings"):
        table.add_column(name)
    for row in known:
        prompt = row["needs"] == "prompt"
        reads = "a prompt with its context" if prompt else f"a text, {row['length']} tokens"
        settings = ", ".join(f"{key}={default}" for key, default in row["settings"].items())
        if row["layers"] is not None:
            settings += f"\nlayers: {row['layers']}"
        cells = (row["name"], row["arxiv"], f"{reads}; for {row['use']}", settings)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _rows(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _act(found: Found) -> tuple[Table, list[str]]:
    heads = found["heads"]
    rows = [[str(x["layer"]), str(x["head"]), f"{x['change']:+.5f}"] for x in heads[:_MOST]]
    said = [f"{len(heads)} of {found['tried']} heads lower the loss alone."]
    if len(heads) > _MOST:
        said[0] = f"... {said[0]}"
    for name, words in (("text", "this text"), ("after", "the tokens after it")):
        if name in found["loss"]:
            before, after = (found["loss"][name][side] for side in ("before", "after"))
            said.append(
                f"Together, on {words}: {before:.3f} to {after:.3f} nats a token "
                f"({after - before:+.3f})."
            )
    return _rows(("layer", "head", "loss, nats"), rows), said


def _var(found: Found) -> tuple[Table, list[str]]:
    every = [*found["dims"], *([] if found["next"] is None else [found["next"]])]
    rows = [
        [str(x["dimension"]), f"{x['mean']:.1f}", f"{x['largest']:.1f}", f"{x['layers']:.0%}"]
        for x in every
    ]
    dims = ", ".join(str(x["dimension"]) for x in found["dims"])
    said = f"Massive, above {found['tau']:.1f} times the token's rms: {dims}."
    if found["next"] is not None:
        said += " The last row is the strongest of the others."
    return _rows(("dimension", "mean", "largest", "layers above"), rows), [said]


def _vhr(found: Found) -> tuple[Table, list[str]]:
    rows = [
        [
            str(x["layer"]),
            ", ".join(str(head) for head in x["heads"]),
            ", ".join(f"{found['divergence'][x['layer']][head]:.2f}" for head in x["heads"]),
        ]
        for x in found["heads"]
    ]
    count = sum(len(x["heads"]) for x in found["heads"])
    said = f"{count} heads change most without the context; the divergence is the plain model's."
    return _rows(("layer", "heads", "divergence"), rows), [said]


def _vista(found: Found) -> tuple[Table, list[str]]:
    rows = [[str(x["layer"]), f"{x['norm']:.2f}", f"{x['share']:.0%}"] for x in found["layers"]]
    said = "Norm of each layer's direction, and its share of the last token's hidden state."
    return _rows(("layer", "norm", "share"), rows), [said]


def _hylra(found: Found) -> tuple[Table, list[str]]:
    rows = [
        [
            str(x["layer"]),
            x["role"],
            "" if x["reads"] is None else str(x["reads"]),
            f"{x['density']:.3f}",
            "" if x["overlap"] is None else f"{x['overlap']:.2f}",
        ]
        for x in found["layers"]
    ]
    sizes = ", ".join(f"{name} {size}" for name, size in found["sizes"].items())
    return _rows(("layer", "role", "reads", "density", "overlap"), rows), [f"Sizes: {sizes}."]


def _moa(found: Found) -> tuple[Table, list[str]]:
    rows = [
        [str(x["layer"]), "  ".join(f"{share:.0%}" for share in x["spans"])]
        for x in found["layers"]
    ]
    plan, uniform = (found["influence"][name] for name in ("plan", "uniform"))
    said = (
        f"Density {found['density']:.3f}; influence of what is masked {plan:.3g}, with one span for "
        f"all heads {uniform:.3g}."
    )
    return _rows(("layer", "spans of the key heads"), rows), [said]


_SHOWN: dict[str, Callable[[Found], tuple[Table, list[str]]]] = {
    "act": _act,
    "var": _var,
    "vhr": _vhr,
    "vista": _vista,
    "hylra": _hylra,
    "moa": _moa,
}
