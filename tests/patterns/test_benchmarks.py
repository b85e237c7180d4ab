"""The benchmarks that the cards name print rows of the agreed form, and what they claim."""

from __future__ import annotations

import math

from benchmarks import bytetransformer, flashbias

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}


def test_flashbias():
    rows = flashbias.alibi(64) + flashbias.ranks() + flashbias.growth((16, 32))
    assert all(set(row) == COLUMNS and math.isfinite(row["ours"]) for row in rows)
    assert any(row["note"] == "rank 5 of 144 for -distance, 120 for a random table" for row in rows)
    assert "factors as N^1.00" in rows[-1]["note"]


def test_bytetransformer():
    (row,) = bytetransformer.layer(batch=8, side=48, dim=64)
    assert set(row) == COLUMNS and row["ratio"] > 0
    # Evenly spaced on [0.2 S, S]: 0.6 of the tokens, 0.42 of the attention in the limit.
    assert row["note"].startswith("tokens 0.60, attention area 0.4")
