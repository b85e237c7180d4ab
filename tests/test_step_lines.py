"""Progress where stderr is no terminal: plain lines, few of them, beside results that stay clean."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from regard import step_lines
from regard.bench import compare
from regard.models.progress import Progress
from tests.commands import Captured, run


def until(said: Callable[[], str], words: str) -> str:
    """What was said when it contains the words."""
    text, end = "", time.monotonic() + 20
    while words not in text:
        assert time.monotonic() < end, f"no {words!r} in {text!r}"
        time.sleep(0.01)
        text += said()
    return text


def test_a_step_is_told_once_however_long_it_takes(capsys: Captured) -> None:
    with step_lines.step_lines("first", pause=0.02) as say:
        text = until(lambda: capsys.readouterr().err, "first\n")
        time.sleep(0.2)
        say("second")
        text += until(lambda: capsys.readouterr().err, "second\n")
    assert text + capsys.readouterr().err == "first\nsecond\n"


def test_steps_that_end_before_the_pause_are_not_told(capsys: Captured) -> None:
    with step_lines.step_lines("first", pause=0.5) as say:
        for number in range(1000):
            say(f"step {number}")
        text = until(lambda: capsys.readouterr().err, "\n")
    assert text + capsys.readouterr().err == "step 999\n"


def test_work_that_is_soon_done_or_fails_says_nothing(capsys: Captured) -> None:
    with pytest.raises(KeyError), step_lines.step_lines("first"):
        raise KeyError("first")
    assert capsys.readouterr().err == ""


def test_compare_tells_steps_on_stderr_and_results_on_stdout(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*, progress: Progress, **words: object) -> dict[str, object]:
        progress("window: needles", 3, 7)
        time.sleep(0.5)
        return {"rows": []}

    monkeypatch.setattr(step_lines, "PAUSE", 0.05)
    monkeypatch.setattr(compare, "run", slow)
    status, out, err = run(capsys, "compare", "--json")
    assert status == 0
    assert json.loads(out) == {"rows": []}
    assert err == "window: needles (3 of 7)\n"


def test_a_spinner_becomes_lines_too(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*, progress: Callable[[str], None], **words: object) -> dict[str, object]:
        progress("backend blocks")
        time.sleep(0.5)
        return {"versions": {}}

    monkeypatch.setattr(step_lines, "PAUSE", 0.05)
    monkeypatch.setattr("regard.doctor.report", slow)
    status, out, err = run(capsys, "doctor", "--json")
    assert status == 0 and json.loads(out) == {"versions": {}}
    assert err == "backend blocks\n"


def test_a_reader_that_has_gone_is_no_trace() -> None:
    code = (
        "import os, sys, time; from regard.step_lines import step_lines\n"
        "with step_lines('first', pause=0.02): time.sleep(0.3)\n"
        "print('done')"
    )
    command = f'{{ {sys.executable} -c "{code}" 2>&1 >&3 | true; }} 3>&1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")
