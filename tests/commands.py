"""The command line, run inside the tests' process."""

from __future__ import annotations

import pytest

from regard.cli import main

Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *argv: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of ``regard ARGV``."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err
