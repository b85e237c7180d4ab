"""The command line: output, one line for a mistake, and the doctor behind it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from regard import doctor
from regard.cli import main
from regard.core.masks import Causal, SlidingWindow
from tests.commands import Captured, run

MASKS = "full, window:512, Causal() & SlidingWindow(3, 1),"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["picture", "Causl()"], "there is no Causl. Did you mean Causal?"),
        (["picture"], "Missing argument"),
        (["picture", "Sinks(-1)"], "n must be an integer >= 0, got -1"),
        (["picture", "Causal()", "--n", "0"], "--n"),
        (["picture", "Keys([True])", "--n", "5"], "covers 1 keys, the call has 5"),
        (["picture", "Causal()", "--n", "4", "--png", "/nowhere/x.png"], "/nowhere/x.png"),
        (["catalog", "flashbais"], "did you mean flashbias"),
        (["catalog", "--state", "red"], "unknown state 'red'"),
        (["catalog", "flashbias", "--family", "kernel"], "not both"),
        (["compare", "--text", "/nowhere/x.txt"], "there is no file /nowhere/x.txt"),
        (["compare", "--html", "/nowhere/x.html"], "there is no folder /nowhere"),
        (["compare", "--methods", ","], "names no method"),
        (["compare", "--methods", "full,Causl()"], "Did you mean Causal?"),
        (["compare", "--lenght", "3"], "No such option"),
        (["compare", "--sample", "--text", "x"], "not both"),
        (["comparre"], "comparre"),
        (["bench", "gna"], "No such command 'gna'"),
        (["bench", "gna-simulate", "--shape", "8,8"], "--window"),
        (["bench", "gna-simulate", "--shape", "8x8", "--window", "4"], "--shape must be whole"),
        (
            ["bench", "gna-simulate", "--shape", "8,8", "--window", "9"],
            "larger than the 8 positions",
        ),
        (["bench", "gna-simulate", "--shape", "8,8", "--window", "4,4,4"], "tuple of 2"),
        (
            ["bench", "gna-simulate", "--shape", "8,8", "--window", "4", "--q-tile", "2,2"],
            "come together",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys: Captured, argv: list[str], message: str) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("regard: ") and err.count("\n") == 1
    assert message in err


def test_traceback_on_demand() -> None:
    with pytest.raises(ValueError, match="there is no Causl"):
        main(["--traceback", "picture", "Causl()"])


@pytest.mark.parametrize("command", ["doctor", "catalog", "picture", "compare", "bench"])
def test_help_has_an_example(capsys: Captured, command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"Example: regard {command}" in out


def test_no_command_shows_help(capsys: Captured) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    assert all(word in out for word in ("doctor", "catalog", "picture", "compare", "bench"))


def shell(command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize(("module", "extra"), [("typer", "cli"), ("rich", "cli")])
def test_a_missing_extra_is_named(module: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; import regard.cli as c; c.main(['catalog'])"
    )
    done = shell(f'{sys.executable} -c "{code}"')
    assert done.returncode == 2
    expected = f"regard: {module} is not installed; pip install 'regard[{extra}]' brings it\n"
    assert done.stderr == expected


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m regard.cli catalog --json | head -n 1"
    done = shell(command)
    assert done.returncode == 0
    assert done.stdout == "[\n"
    assert done.stderr == ""


def test_picture(capsys: Captured, tmp_path: Path) -> None:
    png = tmp_path / "mask.png"
    status, out, err = run(capsys, "picture", "Causal()", "--n", "8", "--png", str(png))
    assert status == 0
    assert "Causal(): 56.2% of 8 x 8 pairs" in out
    assert "█" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert str(png) in err


def test_catalog_as_json(capsys: Captured) -> None:
    status, out, _ = run(capsys, "catalog", "--json")
    rows = json.loads(out)
    assert status == 0
    assert len(rows) == 178
    assert {"key", "family", "title", "state", "entry"} <= set(rows[0])
    _, out, _ = run(capsys, "catalog", "cab", "--json")
    assert json.loads(out)["title"].startswith("CAB: Comprehensive")


def test_catalog_as_tables(capsys: Captured) -> None:
    status, out, _ = run(capsys, "catalog", "--family", "bench")
    assert status == 0
    assert "longca-bench" in out and "flashbias" not in out
    assert "5 systems: " in out
    _, out, _ = run(capsys, "catalog", "longca-bench")
    assert "Long-Context Attention Benchmark" in out


def test_doctor(capsys: Captured) -> None:
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["memory"]["new_ms"] > 0 and found["memory"]["kept_ms"] > 0
    states = {row["name"]: row["state"] for row in found["backends"]}
    assert list(states) == ["reference", "sdpa", "blocks", "flex", "triton"]
    assert {states[name] for name in ("reference", "sdpa", "blocks")} == {"works"}
    assert states["flex"] in ("not run", "unavailable")
    for row in found["calls"]:
        assert row["backend"] in states and row["reason"]
        assert row["density"] is None or 0 < row["density"] <= 1


def test_doctor_in_the_terminal(capsys: Captured) -> None:
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert f"torch {torch.__version__}" in out
    assert "agrees with" in out and "auto picks" in out


def test_doctor_finds_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "execute", lambda q, k, v, chosen, lse: torch.full_like(q, 7.0))
    row = doctor._try_backend("sdpa", torch.device("cpu"), compiled=False)
    assert row["state"] == "wrong" and "differs from the definition" in row["why"]
    monkeypatch.setattr(doctor, "execute", lambda q, k, v, chosen, lse: q * math.nan)
    assert doctor._try_backend("sdpa", torch.device("cpu"), compiled=False)["state"] == "wrong"


def test_doctor_survives_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **words: Any) -> None:
        raise RuntimeError("no kernel\nand a long story")

    monkeypatch.setattr(doctor, "execute", broken)
    row = doctor._try_backend("sdpa", torch.device("cpu"), compiled=False)
    assert (row["state"], row["why"]) == ("fails", "RuntimeError: no kernel")
    monkeypatch.setattr(doctor, "plan", broken)
    assert doctor._try_backend("sdpa", torch.device("cpu"), compiled=False)["state"] == "fails"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A comparison that only records what it was asked for."""
    seen: dict[str, Any] = {}

    def compare(**words: Any) -> dict[str, Any]:
        words.pop("progress")("prefill", 1, 2)
        seen.update(words)
        return {"rows": [], "ppl": math.inf}

    bench = ModuleType("regard.bench")
    bench.compare = ModuleType("regard.bench.compare")  # type: ignore[attr-defined]
    bench.compare.run = compare  # type: ignore[attr-defined]
    bench.compare.table = lambda result: "the table"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "regard.bench", bench)
    monkeypatch.setitem(sys.modules, "regard.bench.compare", bench.compare)
    return seen


def test_compare_passes_its_options(capsys: Captured, asked: dict[str, Any]) -> None:
    status, out, _ = run(capsys, "compare", "--methods", MASKS, "--seed", "3")
    assert status == 0
    assert "the table" in out
    assert asked == {
        "model": "smollm2",
        "text": None,
        "length": 4096,
        "methods": ("full", "window:512", Causal() & SlidingWindow(3, 1)),
        "seed": 3,
        "tasks": False,
    }


def test_compare_as_json_is_valid_json(
    capsys: Captured, asked: dict[str, Any], tmp_path: Path
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("words", encoding="utf-8")
    status, out, _ = run(capsys, "compare", "--text", str(text), "--json", "--length", "64")
    assert status == 0
    assert json.loads(out) == {"rows": [], "ppl": None}
    assert asked["text"] == text and asked["length"] == 64


FLUX = ["--shape", "256,256", "--window", "80,80", "--stride", "16,16", "--share", "0.518"]


def test_bench_without_a_command_shows_help(capsys: Captured) -> None:
    status, out, _ = run(capsys, "bench")
    assert status == 0 and "gna-simulate" in out


def test_gna_simulate(capsys: Captured) -> None:
    tiles = ["--q-tile", "16,16", "--kv-tile", "16,8"]
    status, out, _ = run(capsys, "bench", "gna-simulate", *FLUX, *tiles)
    assert status == 0
    assert "12,800 of 131,072 visited" in out
    assert "10.24 x dense attention; its pairs allow 10.24 x: perfectly block-sparse" in out
    assert "1.88 x at a share of 51.8%" in out
    assert "measured" not in out


def test_gna_simulate_as_json(capsys: Captured) -> None:
    words = ["--shape", "64,64", "--window", "20", "--measure", "--tokens", "300", "--json"]
    status, out, _ = run(capsys, "bench", "gna-simulate", *words)
    found = json.loads(out)
    assert status == 0
    assert found["window"] == [20, 20] and found["stride"] == [1, 1]
    assert found["flop_bound"] == pytest.approx(64 * 64 / 400)
    assert found["measured"]["shape"] == [16, 16] and found["measured"]["speedup"] > 0
