"""Every snippet of the README and of docs/ runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets(page):
    namespace: dict[str, object] = {}
    blocks = _blocks(page, "python")
    assert blocks or page.name not in ("README.md", "guide.md")
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


def _commands() -> list[str]:
    lines = [
        line for page in PAGES for block in _blocks(page, "console") for line in block.splitlines()
    ]
    return [line[2:] for line in lines if line.startswith("$ regard ")]


def _run(command: str, folder: Path) -> str:
    words = [sys.executable, "-m", "regard.cli", *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [c for c in _commands() if " compare " not in c])
def test_commands(command, tmp_path):
    assert _run(command, tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in _commands() if " compare " in c])
def test_commands_that_run_a_model(command, tmp_path):
    sample = (ROOT / "src/regard/data/sample.txt").read_text(encoding="utf-8")
    (tmp_path / "book.txt").write_text(sample, encoding="utf-8")
    assert "streaming" in _run(command, tmp_path)
    assert (tmp_path / "out.html").stat().st_size > 10_000


def test_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} shows {target}"
