"""The report behind `regard bench gna-simulate`: the paper's figures, and what is measured."""

from __future__ import annotations

import pytest

from regard.bench.gna import measured, report, smaller, text
from regard.patterns.neighborhood import Neighborhood


@pytest.mark.parametrize(
    ("shape", "window", "stride", "q_tile", "kv_tile", "share", "best", "whole"),
    [
        # Table of arXiv 2504.16922: FLUX at 4K, and HunyuanVideo.
        ((256, 256), (80, 80), (1, 1), (16, 16), (16, 8), 0.518, 7.06, 1.80),
        ((256, 256), (80, 80), (16, 16), (16, 16), (16, 8), 0.518, 10.24, 1.88),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (16, 8, 2), (2, 8, 8), 0.607, 11.11, 2.23),
    ],
)
def test_the_papers_figures(shape, window, stride, q_tile, kv_tile, share, best, whole):
    found = report(shape, window, stride, q_tile=q_tile, kv_tile=kv_tile, share=share)
    assert round(found["speedup"], 2) == best
    assert round(found["end_to_end"], 2) == whole
    assert found["perfectly_block_sparse"] == (stride[0] == 16)
    assert found["measured"] is None
    said = text(found)
    assert f"{best:.2f} x dense attention" in said and f"{whole:.2f} x at a share" in said
    assert ("perfectly block-sparse" in said) == (stride[0] == 16)


def test_measured_beside_the_best_possible():
    found = report((64, 64), (24, 24), (8, 8), share=0.5, measure=True, tokens=300)
    here = found["measured"]
    assert here["shape"] == (16, 16) and here["window"] == (6, 6) and here["stride"] == (2, 2)
    assert here["speedup"] == here["dense_seconds"] / here["seconds"] > 0
    # 16^4 pairs over 16^2 queries of 36 keys; tiles hold more than the pairs.
    assert here["flop_bound"] == pytest.approx(256 / 36)
    assert 1 <= here["tile_bound"] <= here["flop_bound"]
    assert here["end_to_end"] == pytest.approx(1 / (0.5 + 0.5 / here["speedup"]))
    assert "on 16 x 16, window 6 x 6, stride 2 x 2, where pairs allow 7.11 x" in text(found)


def test_smaller_keeps_the_pattern():
    mask = Neighborhood((64, 32), (16, 8), (4, 1), (2, 1), (True, False))
    assert smaller(mask, 64 * 32) == mask
    assert smaller(mask, 600) == Neighborhood((32, 16), (8, 4), (2, 1), (2, 1), (True, False))
    with pytest.raises(ValueError, match=r"no smaller form of Neighborhood.* at most 2 tokens"):
        smaller(mask, 2)


def test_a_window_of_everything_is_full_attention():
    here = measured(Neighborhood((64,), 64))
    assert here["flop_bound"] == 1.0 and here["tile_bound"] in (None, 1.0)
