"""S2-Attention against its definition, block by block, and against its limiting cases."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import s2 as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.golden.test_golden import DATA, cases, load
from tests.patterns.blocks import is_tight

from regard import Causal, Dense, attend, merge
from regard.patterns.s2 import S2, is_kv_efficient, s2_attention, s2_kv_keep, s2_layout, s2_mask


def definition(n, m, h, c, w, v, hk=None, e=0, o=0, homo=False):
    """The causal pattern of arXiv 2407.17678, pair by pair, `(H, n, m)`."""
    hk = hk or h
    step = max(1, int(v / h))
    out = torch.zeros(h, n, m, dtype=torch.bool)
    for head in range(h):
        x = 0 if homo else head // (h // hk)
        for row in range(n):
            i = row + m - n
            for j in range(i + 1):
                a, b = i // c, j // c
                out[head, row, j] = a - b < w or x >= hk - e or (b + x * step + o) % v == 0
    return out


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (1, 43), (9, 50)])
@pytest.mark.parametrize(
    "options",
    [
        {"h": 4, "c": 4, "w": 2, "v": 4},
        {"h": 4, "c": 3, "w": 1, "v": 2, "hk": 2},
        {"h": 6, "c": 4, "w": 1, "v": 3, "hk": 3, "o": 2},
        {"h": 4, "c": 4, "w": 2, "v": 4, "hk": 2, "e": 1},
        {"h": 2, "c": 16, "w": 1, "v": 2},
    ],
)
def test_is_the_definition(n, m, options):
    want = definition(n, m, **options)
    x = {"hk": None, "e": 0, "o": 0, **options}
    mask = s2_mask(x["h"], x["c"], x["w"], x["v"], x["hk"], x["e"], x["o"])
    assert torch.equal(mask.dense(n, m), want)
    kv = mask.shards
    q, k, v = rand(2, x["h"], n, 8), rand(2, kv, m, 8, seed=1), rand(2, kv, m, 5, seed=2)
    out = s2_attention(
        q,
        k,
        v,
        block=x["c"],
        local_blocks=x["w"],
        vert_stride=x["v"],
        dense_heads=x["e"],
        offset=x["o"],
    )
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(attend(q, k, v, mask=mask), whole)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_are_exact_for_any_sizes(data):
    pick = data.draw
    m = pick(st.integers(1, 50))
    n = pick(st.integers(1, m))
    kv = pick(st.integers(1, 3))
    homo, causal = pick(st.booleans()), pick(st.booleans())
    local = pick(st.integers(1, 3))
    mask = S2(
        kv * pick(st.integers(1, 2)),
        pick(st.integers(1, 6)),
        local if causal else (local, pick(st.integers(1, 3))),
        pick(st.integers(1, 5)),
        kv,
        0 if homo else pick(st.integers(0, kv)),
        pick(st.integers(-2, 3)),
        homo,
        causal,
        pick(st.sampled_from((None, "absolute", "relative"))),
        pick(st.sampled_from((None, 2))),
    )
    assert is_tight(mask, n, m, (pick(st.integers(1, 13)), pick(st.integers(1, 13))))


@pytest.mark.parametrize(("n", "m"), [(256, 256), (64, 256), (1, 250), (32, 192)])
def test_layouts_for_key_heads_are_the_mask(n, m):
    for mask in (
        S2(4, 32, 2, 2, 2),
        S2(4, 64, 1, 3, 2, 1),
        S2(2, 32, (1, 2), 3, causal=False),
        S2(4, 32, 1, 3, 2, homo=True),
    ):
        layout = s2_layout(mask, n, m)
        dense = layout.dense()[0]
        if mask.heads is not None:
            dense = dense.repeat_interleave(mask.query_heads // mask.shards, 0)
        assert torch.equal(dense, mask.dense(n, m).view(dense.shape))
    # Where blocks of the pattern lie badly, the mask itself is used.
    assert s2_layout(S2(2, 10), 100, 100) is None
    assert s2_layout(S2(2, 32), 64, 97) is None


def test_limiting_cases():
    n = 40
    causal = Causal().dense(n)
    assert torch.equal(s2_mask(2, 4, 1, 1).dense(n), causal.expand(2, n, n))
    assert torch.equal(s2_mask(4, 4, 10, 4).dense(n), causal.expand(4, n, n))
    union = s2_mask(4, 4, 1, 4).dense(n).any(0)
    assert torch.equal(union, causal)
    assert torch.equal(s2_mask(4, 4, 1, 4, 4, 4).dense(n), causal.expand(4, n, n))
    # Pairs of all heads together: every head its window, and the causal rest once among v heads.
    near = (torch.arange(n)[:, None] // 4) == (torch.arange(n)[None] // 4)
    want = 4 * (causal & near).sum() + (causal & ~near).sum()
    assert s2_mask(4, 4, 1, 4).dense(n).sum() == want


def test_without_causality():
    a, b = torch.arange(12)[:, None], torch.arange(12)[None]
    mask = s2_mask(3, 1, (2, 3), 2, causal=False)
    beyond = (a - b - 1).clamp(min=0) + (b - a - 2).clamp(min=0)
    assert mask.heads is None and torch.equal(mask.dense(12), beyond % 2 == 0)
    mask = s2_mask(2, 1, 2, 2, causal=False, vert_positions="absolute")
    want = torch.stack([((a - b).abs() < 2) | ((b + h) % 2 == 0) for h in range(2)])
    assert torch.equal(mask.dense(12), want)


def test_no_head_has_a_sink_for_sure():
    seen = s2_mask(4, 4, 1, 4).dense(64)[:, -1, 0]
    assert seen.tolist() == [True, False, False, False]


def test_caches_may_drop_what_a_head_never_reads_again():
    mask = s2_mask(4, 4, 2, 4, 2, 1)
    m = 77
    dense = mask.dense(m)[::2]
    for h in range(2):
        for length in (1, 13, 40, 60):
            # Keys that some token at `length` or later reads: to the end of the window's blocks.
            kept = s2_kv_keep(mask, h, torch.arange(length), length)
            assert torch.equal(kept, dense[h, length:, :length].any(0))
        late = s2_kv_keep(mask, h, torch.arange(m))
        assert torch.equal(late[: m - 8], dense[h, -1, : m - 8])
        assert bool(s2_kv_keep(mask, h, 0)) == bool(dense[h, -1, 0])


def test_partitions_of_the_cache_merge():
    mask = s2_mask(4, 4, 1, 2, 2)
    q, k, v = rand(1, 4, 48, 8), rand(1, 2, 48, 8, seed=1), rand(1, 2, 48, 8, seed=2)
    dense = mask.dense(48)
    near = (torch.arange(48)[:, None] // 4) == (torch.arange(48)[None] // 4)
    parts = [attend(q, k, v, mask=Dense(dense & part), return_lse=True) for part in (near, ~near)]
    torch.testing.assert_close(merge(parts)[0], attend(q, k, v, mask=mask))


def test_kv_efficiency():
    for _, arrays, config in cases(load(DATA / "s2.npz")):
        found = is_kv_efficient(torch.from_numpy(np.asarray(arrays["block_mask"])))
        assert found == config["kv_efficient"]
    eye = torch.eye(4, dtype=torch.bool)
    assert is_kv_efficient(eye) and not is_kv_efficient(eye | eye.roll(-2, 1))
    with pytest.raises(ValueError, match="bool"):
        is_kv_efficient(torch.ones(3, 3))


def test_coverage_is_checked():
    with pytest.warns(UserWarning, match="2 of 4 residues.*vert_stride <= 2"):
        s2_mask(4, vert_stride=4, kv_heads=2)
    with pytest.warns(UserWarning, match="4 of 6 residues"):
        s2_mask(2, vert_stride=6)
    with pytest.warns(UserWarning, match="2 of 4 residues"):
        s2_mask(4, vert_stride=4, step=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s2_mask(4, vert_stride=4)
        s2_mask(4, vert_stride=4, kv_heads=2, dense_heads=1)
        s2_mask(4, vert_stride=9, homo=True)
        s2_mask(4, vert_stride=9, causal=False)
        s2_mask(9, vert_stride=3, kv_heads=3)


def test_the_claims_figures():
    (row,) = benchmark.share()
    assert "78 to 78 of 512" in row["note"] and "complete" in row["note"]
    assert "a cache 6.6 times smaller" in row["note"] and "17.7% to 18.0%" in row["note"]
    assert row["bound"] == pytest.approx(1 / 0.179, rel=2e-3)
    few, fewer, mended = benchmark.coverage()
    assert few["note"].startswith("53%") and few["note"].endswith("; warned")
    assert fewer["note"].startswith("38%") and mended["note"].startswith("100%")


def test_cost_tends_to_an_eighth_of_dense():
    (row,) = benchmark.growth()
    late = float(row["note"].split("as N^")[2].split()[0])
    assert 1.7 < late < 2.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: s2_mask(4, kv_heads=3), "kv_heads=3 does not divide heads=4"),
        (lambda: s2_mask(0), "query_heads must be an integer >= 1"),
        (lambda: s2_mask(4, 0), "block must be an integer >= 1"),
        (lambda: s2_mask(4, offset=0.5), "offset must be an integer"),
        (lambda: s2_mask(4, local_blocks=0), "local_blocks must be an integer >= 1"),
        (lambda: s2_mask(4, local_blocks=(1, 2)), "nothing to the right"),
        (lambda: s2_mask(4, vert_positions="x"), "'absolute' or 'relative'"),
        (lambda: s2_mask(4, dense_heads=1, homo=True), "dense_heads=1"),
        (lambda: s2_mask(8).check(4, 4, heads=4), "heads=8, but the call has 4"),
        (lambda: s2_mask(8, causal=False).check(4, 4, heads=4), "made for 8 heads"),
        (lambda: s2_mask(4, dense_heads=5), "there are 4 key heads"),
        (lambda: s2_mask(8).dense(5, 3), "5 queries and 3 keys"),
        (lambda: s2_kv_keep(s2_mask(8), 8, 0), r"h must lie in 0\.\.7"),
        (lambda: s2_kv_keep(s2_mask(8, causal=False), 0, 0), "never reads a dropped block"),
        (lambda: s2_attention(*rand(3, 2, 4, 4)), "must be"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
