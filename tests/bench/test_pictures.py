"""The pictures of docs/patterns.md: drawn by code, small, each shown on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks import pictures

PAGE = Path(__file__).parents[2] / "docs" / "patterns.md"


@pytest.mark.parametrize("name", ["windows", "gna", "clear", "power", "flashbias"])
def test_drawing(name, tmp_path):
    pictures.main(["--to", str(tmp_path), "--only", name])
    (path,) = tmp_path.iterdir()
    drawn = path.read_bytes()
    assert path.name == f"{name}.png" and drawn.startswith(b"\x89PNG")
    assert 3_000 < len(drawn) < 60_000
    # The same picture has the same bytes, so that drawing it again changes no file.
    assert pictures.PICTURES[name]() == drawn


def test_every_picture_is_on_the_page():
    shown = re.findall(r"!\[[^\]]+\]\(pictures/(\w+)\.png\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(pictures.PICTURES)
    sizes = {path.stem: path.stat().st_size for path in pictures.FOLDER.glob("*.png")}
    assert sizes.keys() == pictures.PICTURES.keys()
    assert max(sizes.values()) < 60_000
