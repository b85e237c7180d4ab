"""The examples of `benchmarks/flashbias.py` say what they should, on smaller data."""

from __future__ import annotations

import math
import re

import pytest
import torch
from benchmarks import flashbias
from benchmarks.flashbias_data import chains, cloud, relative_bias

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}


def _shares(note: str) -> list[float]:
    return [float(x) / 100 for x in re.findall(r"([\d.]+)%", note)]


def _check(rows):
    assert all(set(row) == COLUMNS and math.isfinite(row["ours"]) for row in rows)


def test_pde():
    rows = flashbias.pde(64, steps=40)
    _check(rows)
    assert [row["note"].split(",")[0] for row in rows[:4:2]] == ["rank 4", "rank 5"]
    for row in rows[:4]:
        assert max(float(x) for x in re.findall(r"\d+e-\d+", row["note"])) < 1e-4
    before, after, _, _, noise = map(float, re.findall(r"\d+\.?\d*", rows[4]["note"]))
    assert after < before and after < noise


def test_swin():
    rows = flashbias.swin(6, steps=5, windows=2)
    _check(rows)
    notes = {row["name"].rsplit(", ", 1)[0]: row["note"] for row in rows}
    found = {name: int(re.search(r"rank (\d+)", note)[1]) for name, note in notes.items()}
    assert found["Swin: -distance"] < 8 < 24 < found["Swin: random table"]
    # Tenfold softer, the same errors of the scores and far smaller ones of the output.
    sharp, soft = (_shares(notes[f"Swin: {x}"])[-2:] for x in ("-distance", "-distance / 10"))
    assert soft[0] <= sharp[0] and soft[1] < sharp[1] / 2


def test_curve():
    rows = flashbias.curve(6)
    _check(rows)
    smooth = [_shares(row["note"]) for row in rows if "of -distance," in row["name"]]
    assert smooth == sorted(smooth, key=lambda errors: -errors[0])
    assert smooth[-1][0] == 0.0


def test_alphafold_learns():
    (row,) = flashbias.alphafold(residues=16, examples=32, rank=8, steps=200)
    _check([row])
    scores, output, best, _, all_scores, none = _shares(row["note"])
    assert best < scores < 0.6 < all_scores == 1.0
    assert output < none


def test_data():
    x, weight, field = cloud(50, 3, 2)
    assert x.shape == (1, 1, 50, 3) and weight.min() >= 0
    assert field.std().item() == pytest.approx(1.0)
    pair, single, bias = chains(3, 12)
    assert pair.shape == (3, 12, 12, 16) and single.shape[:2] == (3, 12)
    assert bias.shape == (3, 4, 12, 12)
    # Swin's own indexing of its table.
    table = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    want = relative_bias(table, 3)
    for i in range(9):
        for j in range(9):
            at = i // 3 - j // 3 + 2, i % 3 - j % 3 + 2
            assert torch.equal(want[:, i, j], table[:, at[0], at[1]])
