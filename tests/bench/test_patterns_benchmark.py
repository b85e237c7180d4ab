"""`benchmarks/patterns.py` at small sizes: rows of the agreed form, counts that hold exactly."""

from __future__ import annotations

import math
import re

import pytest
import torch
from benchmarks import patterns
from benchmarks.patterns_cases import GROWTH, speed_cases

from regard import Causal, SlidingWindow

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}
TINY = patterns.Sizes(quick=True, growth=(1024, 4096), natten=8)


def test_speed():
    rows = patterns.speed(TINY)
    assert all(set(row) == COLUMNS and row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    bounds = {row["name"].split(",")[0]: row["bound"] for row in rows}
    # 1024 keys over a window of 64; 32^2 over 16 x 8 and over 8^2.
    assert bounds["neighborhood 1-D"] == pytest.approx(1024 / 64)
    assert bounds["gna"] == pytest.approx(32 * 32 / (16 * 8))
    assert bounds["dilated"] == pytest.approx(32 * 32 / 8**2)
    # Causal pairs over those of a causal window of 64.
    kept = 64 * 1024 - 64 * 63 // 2
    assert bounds["sliding window 64"] == pytest.approx(1024 * 1025 / 2 / kept)


@pytest.mark.parametrize("case", speed_cases(quick=True), ids=lambda case: case.name)
def test_what_is_timed_is_the_pattern(case):
    q, k, v = patterns.qkv(case.tokens)
    got = case.run(q, k, v)
    allowed = case.mask.dense(case.tokens)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    later = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)
    assert case.causal != bool((allowed & later).any())


def test_growth():
    rows = patterns.growth(TINY)
    assert [row["name"] for row in rows] == [f"growth: {name}" for name in GROWTH]
    (window,) = (row["note"] for row in rows if row["name"] == "growth: sliding window 256")
    mask = Causal() & SlidingWindow(255)
    few, many = (mask.layout(n, n, (128, 64)).listed_pairs() for n in (1024, 4096))
    assert f"pairs read grow as N^{math.log(many / few, 4):.2f}, " in window
    assert "stated N: N^1.00" in window


def test_slope():
    assert patterns.slope((1, 2, 4), [3, 12, 48]) == pytest.approx(2.0)
    assert math.isnan(patterns.slope((8,), [1.0]))


def test_natten():
    rows = patterns.natten(TINY)
    assert len(rows) == 5 and all(set(row) == COLUMNS for row in rows)
    for row in rows:
        if row["theirs"] is None:
            assert "NATTEN" in row["note"]
        else:
            assert float(re.search(r"gap (\S+)", row["note"])[1]) < 1e-5
