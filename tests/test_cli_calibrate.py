"""`regard calibrate` on the command line: output, the command that uses the file, and mistakes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from regard.bench import calibrating, compare, steering
from regard.models import MadeFor
from tests.bench.test_calibrating import CONTEXT, PROMPT, Tokenizer, tiny
from tests.commands import Captured, run

ASKED = ["--context", CONTEXT, "--prompt", PROMPT]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, and a tiny model under any name."""
    model = tiny()
    model.generation_config.eos_token_id = None
    for module in (calibrating, steering):
        monkeypatch.setattr(module, "load", lambda name: (model, Tokenizer()))
    monkeypatch.chdir(tmp_path)
    text = "Once upon a time there was a stone, and under it lay a key. " * 4
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    (tmp_path / "context.txt").write_text(CONTEXT, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["act", "--text", "book.txt", "--length", "60", "--set", "threshold=0.06"],
            ["act on smollm2, 60 tokens of the text book.txt", "of 4 heads lower the loss alone"],
        ),
        (["var", "--text", "book.txt", "--length", "60"], ["dimension", "rms: 5."]),
        (["vhr", *ASKED], ["divergence", "heads change most without the context"]),
        (["vista", *ASKED, "--layers", "1, 2"], ["norm", "share"]),
    ],
)
def test_the_last_line_is_the_command_that_uses_the_file(
    capsys: Captured, here: Path, argv: list[str], words: list[str]
) -> None:
    status, out, _ = run(capsys, "calibrate", *argv, "--out", "found")
    assert status == 0
    shown = " ".join(out.split())
    for some in (*words, f"found: {(here / 'found').stat().st_size} bytes"):
        assert some in shown
    use = out.splitlines()[-1]
    assert use.startswith(f"regard steer --method {argv[0]} --set file=found ")
    use = use.replace("CONTEXT", "'under a stone'").replace("PROMPT", "Where")
    status, out, _ = run(capsys, *shlex.split(use)[1:], "--tokens", "2", "--json")
    assert status == 0
    assert json.loads(out)["method"]["name"] == argv[0] and json.loads(out)["kl"] > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["hylra", "--length", "96", "--set", "sparsity=0.5"], ["full", "steps 24"]),
        (["moa", "--length", "128", "--set", "block=8"], ["spans of the key heads", "Density"]),
    ],
)
def test_plans_for_compare(capsys: Captured, here: Path, argv: list[str], words: list[str]) -> None:
    status, out, _ = run(capsys, "calibrate", *argv, "--text", "book.txt", "--out", "plan.json")
    assert status == 0
    assert all(some in out for some in words)
    assert out.splitlines()[-1] == f"regard compare --methods {argv[0]}@plan.json"
    json.loads((here / "plan.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "argv",
    [
        ["act", "--text", "book.txt", "--length", "60", "--set", "threshold=0.06"],
        ["var", "--text", "book.txt", "--length", "60"],
        ["vhr", *ASKED],
        ["vista", *ASKED],
        ["hylra", "--text", "book.txt", "--length", "96", "--set", "sparsity=0.5"],
        ["moa", "--text", "book.txt", "--length", "128", "--set", "block=8"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_file_of_another_model_is_refused(
    capsys: Captured, here: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    (here / "folder").mkdir()
    model = str(here / "folder")
    status, out, _ = run(capsys, "calibrate", *argv, "--out", "found", "--model", model)
    assert status == 0
    written = (here / "found").read_bytes()
    assert b"made_for" in written and str(here).encode() not in written
    other = tiny(num_key_value_heads=4)
    for module in (compare, steering):
        monkeypatch.setattr(module, "load", lambda name: (other, Tokenizer()))
    use = out.splitlines()[-1].replace("CONTEXT", "'under a stone'").replace("PROMPT", "Where")
    status, out, err = run(capsys, *shlex.split(use)[1:])
    assert status == 2 and out == "" and err.count("\n") == 1
    own, its = MadeFor.of(tiny(), "folder"), MadeFor.of(other)
    assert (
        f"was calibrated for folder (4 layers, {own.heads} heads, {own.kv_heads} key heads" in err
    )
    assert f"has 4 layers, {its.heads} heads, {its.kv_heads} key heads" in err


def test_json(capsys: Captured, here: Path) -> None:
    context = ["--context", "@context.txt", "--prompt", PROMPT]
    status, out, _ = run(capsys, "calibrate", "vhr", *context, "--out", "found", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["read"]["context"] == CONTEXT and found["file"] == "found"
    assert run(capsys, "calibrate", "vhr", *context, "--out", "found", "--force")[0] == 0


def test_methods(capsys: Captured) -> None:
    status, out, _ = run(capsys, "calibrate", "--methods")
    assert status == 0 and all(name in out for name in ("act", "vista", "moa", "2406.14909"))
    status, out, _ = run(capsys, "calibrate", "--methods", "--json")
    assert status == 0 and json.loads(out) == calibrating.known()


def test_help(capsys: Captured) -> None:
    status, out, _ = run(capsys, "calibrate", "--help")
    assert status == 0 and "Example: regard calibrate act" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a NAME and --out FILE"),
        (["act"], "give a NAME and --out FILE"),
        (["hylr", "--out", "x"], "did you mean 'hylra'"),
        (["vhr", "--context", "a", "--out", "x"], "give --prompt TEXT"),
        (["vhr", "--context", "@none", "--prompt", "a", "--out", "x"], "there is no file none"),
        (["act", "--out", "none/x"], "there is no folder"),
        (["act", "--out", "book.txt"], "book.txt exists; --force replaces it"),
        (["act", "--out", "."], "is a folder; name a file"),
        (["act", "--text", "none", "--out", "x"], "there is no file none"),
        (["act", "--text", "book.txt", "--out", "x", "--length", "999"], "lower --length"),
        (["act", "--layers", "2;3", "--out", "x"], "--layers must be whole numbers"),
        (["act", "--layers", "-1", "--out", "x"], "--layers must be whole numbers"),
        (["act", "--set", "beta", "--out", "x"], "takes KEY=VALUE"),
        (["act", "--set", "gamma=1", "--out", "x"], "no setting 'gamma'"),
        (["act", "--length", "1", "--out", "x"], "--length"),
    ],
)
def test_a_mistake_is_one_line(capsys: Captured, here: Path, argv: list[str], message: str) -> None:
    before = sorted(path.name for path in here.iterdir())
    status, out, err = run(capsys, "calibrate", *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("regard: ") and err.count("\n") == 1
    assert message in err
    assert sorted(path.name for path in here.iterdir()) == before
