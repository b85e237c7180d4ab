"""PowerAttention against its pseudocode, written out, and against its limiting cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from benchmarks import power as benchmark
from benchmarks import power_passkey
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.blocks import is_tight, same_blocks

from regard import Causal, SlidingWindow, attend
from regard.core.layout import build_layout
from regard.core.reach import block_graph, layers_to_reach, receptive_field
from regard.patterns.power import Power, power_attention, power_mask

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}


def algorithm(n, m, block, window, sinks=1):
    """Algorithm 1 of arXiv 2503.03588, pair by pair."""
    out = torch.zeros(n, m, dtype=torch.bool)
    for row in range(n):
        i = row + m - n
        for j in range(m):
            if i < j:
                continue
            beta = i // block - j // block
            power = (beta & (beta - 1)) == 0
            out[row, j] = beta < window or power or j < sinks * block
    return out


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(77, 77), (1, 77), (9, 64), (1, 1)])
@pytest.mark.parametrize(
    ("block", "window", "sinks"), [(4, 2, 1), (1, 1, 0), (7, 3, 2), (16, 1, 1)]
)
def test_is_the_papers_algorithm(n, m, block, window, sinks):
    want = algorithm(n, m, block, window, sinks)
    assert torch.equal(power_mask(block, window, sinks).dense(n, m), want)
    q, k, v = rand(2, 4, n, 8), rand(2, 2, m, 8, seed=1), rand(2, 2, m, 5, seed=2)
    out = power_attention(q, k, v, block, window, sink_blocks=sinks)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(out, whole)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_are_exact_for_any_sizes(data):
    m = data.draw(st.integers(1, 70))
    n = data.draw(st.integers(1, m))
    block = data.draw(st.tuples(st.integers(1, 19), st.integers(1, 19)))
    draws = (st.integers(1, 9), st.integers(1, 5), st.integers(0, 2))
    mask = Power(*(data.draw(x) for x in draws))
    assert is_tight(mask, n, m, block)
    # The layout made from distances is the one that looks at all blocks.
    assert same_blocks(mask.layout(n, m, block), build_layout(mask, n, m, block))


def test_aligned_layouts_are_partial_on_the_diagonal_only():
    layout = Power(64, 3, 1).layout(1024, 1024, 64)
    diagonal = torch.arange(16).view(1, 1, 16, 1) == layout.index
    assert torch.equal(layout.partial, diagonal)


def test_limiting_cases():
    n = 60
    assert torch.equal(Power(8, 8).dense(n), Causal().dense(n))
    distances = [n - 1 - j for j in range(n) if Power(1, 1, 0).dense(n)[-1, j]]
    assert sorted(distances) == [0, 1, 2, 4, 8, 16, 32]
    # Blocks of one row: at most W + floor(log2 row) + 2.
    counts = Power(1, 5, 1).dense(200).sum(-1)
    for row in range(1, 200):
        assert counts[row] <= 5 + math.floor(math.log2(row)) + 2
    assert Power() == power_mask(256, 5, 1)


def test_decoding_is_the_last_row_of_the_prompt():
    q, k, v = (rand(1, 2, 50, 4, seed=x) for x in range(3))
    whole = power_attention(q, k, v, 4, 2)
    for length in (1, 17, 50):
        last = power_attention(
            q[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length], 4, 2
        )
        torch.testing.assert_close(last, whole[:, :, length - 1 : length])


def test_combines_with_other_masks():
    mask = power_mask(4, 1, 0) | (Causal() & SlidingWindow(2))
    want = algorithm(30, 30, 4, 1, 0) | (Causal() & SlidingWindow(2)).dense(30)
    q, k, v = (rand(1, 1, 30, 4, seed=x) for x in range(3))
    out = attend(q, k, v, mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=want))
    assert eval(repr(mask), {**globals()}) == mask


def test_receptive_field_counts_one_bits():
    graph = Power(1, 1, 0).dense(128)
    fields = receptive_field(graph, 6)[:, -1].flip(-1)
    for depth, field in enumerate(fields, 1):
        # Distances with at most `depth` one-bits, and so no gap up to 2^depth.
        want = torch.tensor([bin(d).count("1") <= depth for d in range(128)])
        assert torch.equal(field, want) and bool(field[: 2**depth].all())
    assert layers_to_reach(graph, Causal().dense(128)) == 7
    assert layers_to_reach(Causal().dense(8), torch.ones(8, 8, dtype=torch.bool)) is None
    layout = Power(16, 1, 0).layout(16 * 128, 16 * 128, 16)
    assert torch.equal(block_graph(layout)[0, 0], graph)
    for bad, words in ((graph[:3], "square bool"), (graph.float(), "square bool")):
        with pytest.raises(ValueError, match=words):
            receptive_field(bad, 2)
    with pytest.raises(ValueError, match="at least 1"):
        receptive_field(graph, 0)


def test_the_claims_figures():
    window, paper, alone = benchmark.reach()
    assert (
        window["note"].startswith("9, 17, 25, 33, 41, 49 blocks") and "after 16" in window["note"]
    )
    assert (
        paper["note"].startswith("9, 34, 74, 109, 125, 128 blocks") and "after 6;" in paper["note"]
    )
    assert alone["note"].startswith("8, 29, 64, 99, 120, 127 blocks") and "after 7" in alone["note"]
    assert [r["note"].split()[-5] for r in (window, paper, alone)] == ["10", "10", "8"]
    (sparse,) = benchmark.sparsity()
    assert "at most 10 of 128 blocks a row, 0.93" in sparse["note"]
    assert all(set(r) == COLUMNS for r in (window, paper, alone, sparse))


def test_cost_grows_as_n_log_n():
    (row,) = benchmark.growth()
    slope = float(row["note"].split("N^")[1].split(";")[0])
    assert 1.1 < slope < 1.3
    pairs = [Power(64).layout(n, n, 64).listed_pairs() for n in (16384, 32768, 65536)]
    # One more block a row each time the length doubles.
    assert pairs[1] / pairs[0] < 2.3 and pairs[2] / pairs[1] < 2.3


def test_passkey_training_repeats_and_reports():
    mask = power_mask(4, 2, 1)
    a, b = (power_passkey.train(mask, 32, 1, 3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    rows = benchmark.passkey(n=32, layers=1, steps=2, trials=2)
    assert len(rows) == 2 and all(set(r) == COLUMNS for r in rows)


@pytest.mark.slow
def test_power_finds_the_passkey_where_a_window_of_equal_cost_cannot():
    power, window = benchmark.passkey()
    right = [float(r["note"].split()[0]) for r in (power, window)]
    assert right[0] > right[1] + 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Power(0), "block must be an integer >= 1, got 0"),
        (lambda: Power(4, 0), "window must be an integer >= 1"),
        (lambda: Power(4, 1, -1), "sink_blocks must be an integer >= 0"),
        (lambda: Power(2.0), "block must be an integer"),
        (lambda: Power(4).dense(5, 3), "5 queries and 3 keys"),
        (lambda: power_attention(*rand(3, 1, 2, 0, 4), 4, 1), "expected N >= 1"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
