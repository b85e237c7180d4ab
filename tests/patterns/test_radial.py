"""Radial Attention against its definition over four indices, and the official blocks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from benchmarks import radial as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.blocks import is_tight

from regard import attend
from regard.core.layout import build_layout
from regard.patterns.radial import (
    RadialBlocks,
    keep_by_distance,
    radial_block_map,
    radial_block_mask,
    radial_mask,
    width_by_distance,
)


def definition(f, s, sink=True, text=0):
    """The paper's mask, `(f, s, f, s)`, pair by pair."""
    total = f * s + text
    out = torch.zeros(f, s, f, s, dtype=torch.bool)
    for i in range(f):
        for j in range(f):
            d = abs(i - j)
            p = 2 ** math.floor(math.log2(max(d, 1)))
            for k in range(s):
                for at in range(s):
                    band = p <= s and abs(k - at) + 1 <= s / p
                    line = d % math.ceil(p / s) == 0 and k == at
                    out[i, k, j, at] = band or line or (sink and j == 0)
    whole = torch.ones(total, total, dtype=torch.bool)
    whole[: f * s, : f * s] = out.view(f * s, f * s)
    return whole


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "s", "sink", "text"),
    [(9, 6, True, 0), (9, 6, False, 0), (17, 3, True, 5), (12, 5, False, 2), (6, 1, False, 0)],
)
def test_is_the_definition(f, s, sink, text):
    want = definition(f, s, sink, text)
    mask = radial_mask(f, s, sink=sink, text=text)
    n = len(want)
    assert torch.equal(mask.dense(n), want)
    assert mask.pairs() == want.sum() and mask.density(n) == pytest.approx(float(want.sum()) / n**2)
    assert mask.density(5, n) == pytest.approx(want[-5:].double().mean().item())
    q, k, v = rand(2, 4, n, 8), rand(2, 2, n, 8, seed=1), rand(2, 2, n, 5, seed=2)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, mask=mask), whole)
    torch.testing.assert_close(attend(q[:, :, -7:], k, v, mask=mask), whole[:, :, -7:])
    at = torch.arange(n)
    assert torch.equal(mask.flex(n, n)(0, 0, at[:, None], at[None]), want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_are_exact_for_any_sizes(data):
    pick = data.draw
    f, s, text = pick(st.integers(1, 12)), pick(st.integers(1, 8)), pick(st.integers(0, 5))
    mask = radial_mask(f, s, sink=pick(st.booleans()), text=text)
    n = pick(st.integers(1, mask.tokens))
    block = pick(st.tuples(st.integers(1, 17), st.integers(1, 17)))
    assert is_tight(mask, n, mask.tokens, block)
    layout = mask.layout(n, mask.tokens, block)
    assert torch.equal(layout.dense()[0, 0], mask.dense(n, mask.tokens))


def test_layouts_regroup_tokens_when_that_leaves_fewer_blocks():
    mask = radial_mask(32, 64)
    layout = mask.layout(2048, 2048, (128, 64))
    assert layout.permuted
    plain = build_layout(mask, 2048, 2048, (128, 64))
    assert layout.density < 0.85 * plain.density
    assert layout.allowed_pairs() == plain.allowed_pairs() == mask.pairs()


def test_limiting_cases():
    for f in (1, 2):
        assert radial_mask(f, 7, sink=False).dense(7 * f).all()
    plain = radial_mask(11, 5, sink=False).dense(55)
    assert torch.equal(plain, plain.T)
    # Frame pairs at one distance keep equally many pairs.
    counts = plain.view(11, 5, 11, 5).sum((1, 3))
    for d in range(11):
        assert len(set(counts.diagonal(d).tolist())) == 1
    assert bool(plain.diagonal().all())


def test_official_blocks_against_its_own_rules():
    # Frames that are multiples of a block: no shifts, the local mask shrunk by itself.
    f, s, block = 5, 256, 128
    found = radial_block_map(f, s, variant="hunyuan")
    widths, kept = width_by_distance(f, s), keep_by_distance(f, s)
    place = torch.arange(s)
    for i in range(f):
        for j in range(f):
            local = ((place[:, None] - place).abs() <= widths[abs(i - j)]) & kept[abs(i - j)]
            dense = local.view(2, block, 2, block).float()
            share = dense.mean(1)
            many, some = (share > 1 / 3).sum(-1), (share > 0).sum(-1)
            want = many / (some + 1e-9) > 0.6
            assert torch.equal(found[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], want)
    assert radial_block_map(f, s, variant="wan")[:, :2].all()


def test_official_blocks_forget_no_shape():
    # The official class keeps one mask for all shapes; here each has its own.
    a = radial_block_map(4, 128)
    b = radial_block_map(8, 128)
    assert a.shape == (4, 4) and b.shape == (8, 8)
    a.zero_()
    assert radial_block_map(4, 128).any()


def test_official_blocks_as_a_mask():
    mask = radial_block_mask(6, 20, text=8, block=8, variant="hunyuan")
    want = mask.blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert (
        torch.equal(mask.dense(128), want) and bool(want[120:].all()) and bool(want[:, 120:].all())
    )
    assert is_tight(mask, 128, 128, (16, 8)) and is_tight(mask, 37, 128, (7, 11))
    layout = mask.layout(128, 128, 8)
    assert not layout.partial.any()
    assert mask == RadialBlocks(6, 20, 8, 8, 1.0, "hunyuan") and hash(mask) == hash(mask)
    q, k, v = (rand(1, 2, 128, 4, seed=x) for x in range(3))
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=want)
    torch.testing.assert_close(attend(q, k, v, mask=mask), whole)


def test_the_claims_figures():
    notes = [r["note"] for r in benchmark.kept()]
    shares = [float(note.split()[1].rstrip(",")) for note in notes]
    assert shares == pytest.approx([0.529, 0.217, 0.127, 0.078], abs=6e-4)
    ratios = [float(note.split("; ")[1].split()[0]) for note in notes]
    assert all(0.52 <= x <= 0.63 for x in ratios)
    rows = benchmark.approximation()
    assert [r["note"].split("better is ")[1].split(";")[0] for r in rows] == [
        "radial",
        "radial",
        "neither",
        "window",
    ]
    assert "0.695" in benchmark.official()[0]["note"]


def test_cost_grows_as_n_log_n():
    (row,) = benchmark.growth(frames=(4, 8, 16))
    assert "allowed n^" in row["note"]
    pairs = [radial_mask(f, 256).pairs() for f in (64, 128, 256)]
    # Doubling the frames doubles the pairs and adds an octave of distances.
    assert pairs[1] / pairs[0] < 2.45 and pairs[2] / pairs[1] < pairs[1] / pairs[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: radial_mask(0, 3), "frames must be an integer >= 1"),
        (lambda: radial_mask(3, 2.5), "tokens_per_frame must be an integer >= 1"),
        (lambda: radial_mask(3, 4, text=-1), "text must be an integer >= 0"),
        (lambda: radial_mask(3, 4).layout(13), "12 in all"),
        (lambda: radial_block_map(3, 200), "do not hold the last frame"),
        (lambda: radial_block_map(3, 128, block=0), "block must be an integer >= 1"),
        (lambda: radial_block_map(3, 128, variant="x"), "'wan' or 'hunyuan'"),
        (lambda: radial_block_map(3, 128, decay_factor=-1.0), "decay_factor must be positive"),
        (lambda: radial_block_mask(3, 100), "300 tokens are no multiple"),
        (lambda: radial_block_mask(2, 128).dense(128), "made for 256 tokens"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
