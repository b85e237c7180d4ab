"""Replay golden cases: numbers that somebody else's code made, through one adapter a system.

An adapter is a module of this package named after the system's key (`-` written as `_`), with

    replay(case) -> {name: array}

`case` holds every array of the file by its name, and under `"meta"` the parsed JSON of the file.
What `replay` returns is compared with the arrays of the same names. It reads every size and option
from the case, so a case that it has never seen replays too. `RTOL` and `ATOL` of the adapter bound
the error; `OUTPUTS` lists the names that each case of the file must be compared by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

RTOL, ATOL = 1e-4, 1e-6


class ReplayError(Exception):
    """A file that cannot be replayed, and why."""


@dataclass(frozen=True)
class Result:
    """One compared output: `error` is the largest difference over the largest expected value."""

    name: str
    error: float
    ok: bool
    note: str = ""


def load(path: Path) -> dict[str, Any]:
    """The arrays of a file, and its parsed `meta`. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            case: dict[str, Any] = {name: file[name] for name in file.files}
        case["meta"] = json.loads(str(case["meta"])) if "meta" in case else {}
    except (OSError, ValueError) as error:
        raise ReplayError(f"cannot be read: {error}") from error
    return case


def adapter(path: Path) -> ModuleType:
    """The adapter of a file: its key is the file's name up to the first dot.

    A name such as `flashbias-2.npz` or `flashbias_other.npz` also finds the adapter `flashbias`.
    """
    key = path.name.split(".")[0].replace("-", "_")
    parts = key.split("_")
    for stop in range(len(parts), 0, -1):
        name = "_".join(parts[:stop])
        if name and not name.startswith("test") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
    raise ReplayError(f"no adapter {key}.py")


def cases(case: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The cases of a file: prefix (`"c0_"`), arrays without the prefix, configuration.

    A file without numbered arrays is one case with the prefix `""` and its whole meta.
    """
    meta = case.get("meta", {})
    if not isinstance(meta, Mapping):
        meta = json.loads(str(meta))
    numbers = sorted(
        {int(x[1:].split("_")[0]) for x in case if x[:1] == "c" and x[1:].split("_")[0].isdigit()}
    )
    if not numbers:
        yield "", {k: v for k, v in case.items() if k != "meta"}, dict(meta)
    configs = meta.get("cases", [])
    for number in numbers:
        prefix = f"c{number}_"
        arrays = {k[len(prefix) :]: v for k, v in case.items() if k.startswith(prefix)}
        yield prefix, arrays, dict(configs[number]) if number < len(configs) else {}


def replay_file(path: Path) -> list[Result]:
    """Replay a file and compare every output.

    Raises:
        ReplayError: the file cannot be read or has no adapter, or the adapter fails on it.
    """
    module, case = adapter(path), load(path)
    try:
        got = module.replay(dict(case))
    except Exception as error:
        raise ReplayError(f"replay failed: {type(error).__name__}: {error}") from error
    rtol, atol = getattr(module, "RTOL", RTOL), getattr(module, "ATOL", ATOL)
    results = [_compare(name, value, case.get(name), rtol, atol) for name, value in got.items()]
    for prefix, arrays, _ in cases(case):
        for name in module.OUTPUTS:
            if name in arrays and prefix + name not in got:
                results.append(Result(prefix + name, float("inf"), False, "not replayed"))
    if not results:
        raise ReplayError("the adapter returned nothing to compare")
    return results


def _compare(name: str, value: Any, want: Any, rtol: float, atol: float) -> Result:
    if want is None:
        return Result(name, float("inf"), False, "not in the file")
    value, want = np.asarray(value), np.asarray(want)
    if value.shape != want.shape:
        return Result(name, float("inf"), False, f"shape {value.shape}, expected {want.shape}")
    value, want = value.astype(np.float64), want.astype(np.float64)
    # Where both are the same infinity or NaN there is no difference.
    same = (value == want) | (np.isnan(value) & np.isnan(want))
    finite = np.isfinite(want)
    gap = np.abs(np.subtract(value, want, where=~same, out=np.zeros_like(want)))
    size = float(np.abs(want[finite]).max(initial=0.0))
    worst = float(gap.max(initial=0.0))
    error = worst / size if size else worst
    return Result(name, error, bool(worst <= atol + rtol * size))
