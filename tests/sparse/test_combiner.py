"""Combiner against its matrix written out, its limiting cases, and the claims of the paper."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from benchmarks import combiner as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import Causal, attend
from regard.sparse.combiner import (
    PATTERNS,
    CombinerCache,
    combiner_attention,
    summaries,
)
from regard.sparse.combiner_axial import running_max
from regard.sparse.combiner_module import (
    Combiner,
    CombinerRowMajor,
    row_summary,
    rowmajor_attention,
)
from regard.sparse.combiner_probs import combiner_probs, support

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}
FORMS = [
    ("fixed", True, "max"),
    ("fixed", False, "max"),
    ("log", True, "max"),
    ("axial", True, "max"),
    ("axial", True, "sum"),
]


def qkv(n, heads=4, kv_heads=4, width=5, batch=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, 3))
    return [
        torch.randn(batch, h, n, d, generator=g, dtype=torch.float64).to(dtype) for h, d in shapes
    ]


def weighed(probs, v):
    return probs @ v.repeat_interleave(probs.shape[1] // v.shape[1], dim=1)


@pytest.mark.parametrize(("pattern", "causal", "running"), FORMS)
@pytest.mark.parametrize(("n", "seg"), [(1, 1), (12, 3), (12, 12), (12, 1), (35, 5)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_is_the_factorised_definition(pattern, causal, running, n, seg, kv_heads):
    q, k, v = qkv(n, kv_heads=kv_heads)
    probs = combiner_probs(q, k, pattern, seg, causal, running=running)
    out = combiner_attention(q, k, v, pattern, seg, causal, running=running)
    torch.testing.assert_close(out, weighed(probs, v))
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, n, dtype=torch.float64))
    allowed = Causal().dense(n) if causal else torch.ones(n, n, dtype=torch.bool)
    assert torch.equal(probs > 0, allowed.expand_as(probs))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70))
def test_log_regions_tile_what_came_before(n):
    for i in range(n):
        direct, regions = support(i, n, "log", 1)
        assert direct == [i]
        assert sorted(j for region in regions for j in region) == list(range(i))
        assert len(regions) == bin(i).count("1")
    q, k, v = qkv(n, heads=2, kv_heads=1, batch=1)
    out = combiner_attention(q, k, v, "log")
    torch.testing.assert_close(out, weighed(combiner_probs(q, k, "log"), v))


def test_the_last_token_after_a_power_of_two_has_its_region():
    # The official ceil(log2(N - 1)) levels leave the last token of 17 with itself alone.
    q, k, v = qkv(17)
    probs = combiner_probs(q, k, "log")
    assert (probs[..., -1, :] > 0).all() and (probs[..., -1, -1] < 1).all()
    out = combiner_attention(q, k, v, "log")
    assert (out[:, :, -1] - v[:, :, -1]).abs().amax(-1).min() > 1e-3


def test_summaries_are_written_out():
    q, k, v = qkv(12, kv_heads=2)
    keys, values = summaries(q, k, v, 4)
    scaled, wide = q * 5**-0.5, [x.repeat_interleave(2, dim=1) for x in (k, v)]
    for c in range(3):
        part = slice(4 * c, 4 * c + 4)
        query = scaled[:, :, part].amax(2, keepdim=True)
        inside = (query @ wide[0][:, :, part].mT).softmax(-1)
        torch.testing.assert_close(keys[:, :, c], wide[0][:, :, part].amax(2))
        torch.testing.assert_close(values[:, :, c], (inside @ wide[1][:, :, part])[:, :, 0])


@pytest.mark.parametrize("seg", [1, 20])
def test_one_token_or_one_whole_segment_is_causal_attention(seg):
    q, k, v = qkv(20, kv_heads=2)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(combiner_attention(q, k, v, "fixed", seg), full)
    # a single row has no columns above, a single column no rest of its rows
    torch.testing.assert_close(combiner_attention(q, k, v, "axial", seg), full)


def test_bidirectional_segments_count_their_own_summary_too():
    q, k, v = qkv(6)
    both = combiner_attention(q, k, v, "fixed", 6, causal=False)
    key, value = summaries(q, k, v, 6)
    k, v = torch.cat([k, key], 2), torch.cat([v, value], 2)
    torch.testing.assert_close(both, F.scaled_dot_product_attention(q, k, v))


def test_running_max_is_cummax():
    x = qkv(37)[0]
    for axis in (0, 2, 3):
        assert torch.equal(running_max(x, axis), x.cummax(axis).values)


@pytest.mark.parametrize(("pattern", "causal", "running"), FORMS)
def test_dtypes_batches_and_gradients(pattern, causal, running):
    def fn(q, k, v):
        return combiner_attention(q, k, v, pattern, 4, causal, running=running)

    q, k, v = qkv(16, kv_heads=2)
    want = fn(q, k, v)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        out = fn(*(x.to(dtype) for x in (q, k, v)))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    assert fn(q[:0], k[:0], v[:0]).shape == (0, 4, 16, 3)
    assert fn(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 4, 0, 3)
    small = [x.requires_grad_() for x in qkv(8, heads=2, kv_heads=1, batch=1)]
    assert torch.autograd.gradcheck(fn, small)


@pytest.mark.parametrize(("pattern", "causal", "running"), [f for f in FORMS if f[1]])
def test_later_tokens_move_no_bit(pattern, causal, running):
    q, k, v = qkv(24, dtype=torch.float32)
    before = combiner_attention(q, k, v, pattern, 4, running=running)
    for at in range(1, 24):
        later = [torch.cat([x[:, :, :at], x[:, :, at:] + 50], 2) for x in (q, k, v)]
        out = combiner_attention(*later, pattern, 4, running=running)
        assert torch.equal(out[:, :, :at], before[:, :, :at])
        assert not torch.equal(out[:, :, at], before[:, :, at])


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("steps", [(24,), (1,) * 24, (3, 1, 7, 8, 5), (4, 4, 16), (0, 24)])
def test_decoding_is_the_whole(steps, kv_heads):
    q, k, v = qkv(24, kv_heads=kv_heads)
    whole = combiner_attention(q, k, v, "fixed", 4)
    cache, done, parts = CombinerCache(4), 0, []
    for n in steps:
        parts.append(cache.attend(*(x[:, :, done : done + n] for x in (q, k, v))))
        done += n
        # finished segments, and the running one
        assert cache.entries == (done // 4, done % 4) and cache.length == done
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_module_decodes_what_it_computes():
    torch.manual_seed(0)
    module = Combiner(12, 3, "fixed", 4).double()
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    cache = module.new_cache()
    steps = [module(part, cache) for part in x.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), module(x))
    # a length that no segment divides is for decoding alone
    with pytest.raises(ValueError, match="15 tokens for seg=4"):
        module(x[:, :15])
    with pytest.raises(ValueError, match="decoding needs"):
        Combiner(12, 3, "fixed", 4, causal=False).new_cache()


@pytest.mark.parametrize("seg", [1, 4, 12])
def test_rowmajor_is_its_definition(seg):
    n = 12
    q, k, v = qkv(n)
    summary, keys = row_summary(q, k, v, seg), qkv(n, seed=3)[1]
    out = rowmajor_attention(q, k, v, seg, keys, summary)
    scale = 5**-0.5
    for i in range(n):
        r, c = divmod(i, seg)
        direct = list(range(r * seg, i + 1))
        above = [row * seg + c for row in range(r)]
        scores = torch.cat([k[:, :, direct], keys[:, :, above]], 2) @ q[:, :, i, :, None] * scale
        values = [v[:, :, direct]]
        for j in above:
            row = slice(j // seg * seg, (j // seg + 1) * seg)
            inside = (k[:, :, row] @ q[:, :, j, :, None] * scale).softmax(2)
            values.append((inside * v[:, :, row]).sum(2, keepdim=True))
        want = (scores.softmax(2) * torch.cat(values, 2)).sum(2)
        torch.testing.assert_close(out[:, :, i], want)


@pytest.mark.parametrize(("pattern", "causal", "running"), FORMS)
def test_module_is_the_function_between_projections(pattern, causal, running):
    torch.manual_seed(0)
    module = Combiner(12, 3, pattern, 4, causal, running=running).double()
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    out = weighed(combiner_probs(q, k, pattern, 4, causal, running=running), v)
    torch.testing.assert_close(module(x), module.out(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("keys", ["proj", "wsum", "none"])
def test_rowmajor_modules_see_all_that_came_before_and_nothing_else(keys):
    torch.manual_seed(0)
    module = CombinerRowMajor(12, 3, 4, keys).double()
    x = torch.randn(1, 16, 12, dtype=torch.float64)
    moved = torch.autograd.functional.jacobian(module, x)[0, :, :, 0].abs().sum((1, 3))
    assert torch.equal(moved > 0, Causal().dense(16))


def test_rowmajor_of_one_row_is_causal_attention():
    torch.manual_seed(0)
    module = CombinerRowMajor(12, 3, 8).double()
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    want = module.out(attend(q, k, v, mask=Causal()).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), want)


def test_cost_counts_what_is_read():
    for pattern in PATTERNS:
        for n, seg in ((1, 1), (16, 4), (12, 3), (12, 12), (6, 1), (40, 5)):
            found = (support(i, n, pattern, seg) for i in range(n))
            read = sum(len(direct) + len(regions) for direct, regions in found)
            assert benchmark.products(n, pattern, seg)[0] == read
    slopes = {}
    for pattern, row in zip(PATTERNS, benchmark.growth(), strict=True):
        assert set(row) == COLUMNS
        slopes[pattern] = float(row["note"].split("N^")[1].split(";")[0])
    assert 1.45 < slopes["fixed"] < 1.55 and 1.45 < slopes["axial"] < 1.55
    assert 1.0 < slopes["log"] < 1.15


def test_the_log_forms_work_is_what_is_counted():
    # doubling N adds one level: time per token grows by a constant
    made = [benchmark.products(n, "log", 1)[1] / n for n in (1024, 2048, 4096, 8192)]
    steps = [b - a for a, b in itertools.pairwise(made)]
    assert all(math.isclose(step, 0.5, abs_tol=0.01) for step in steps)


def test_support_rows_print_the_claim():
    rows = benchmark.support_rows(32, 4)
    assert all(set(row) == COLUMNS and row["note"].startswith("100% of") for row in rows)
    direct = [float(row["note"].split("are ")[1].rstrip("%")) for row in rows]
    assert max(direct) < 50


@pytest.mark.slow
def test_recalls_what_its_segments_alone_cannot():
    full, alone, *ours = benchmark.recall(steps=150)
    share = [float(row["note"].split("%")[0]) for row in (full, alone, *ours)]
    assert share[0] > 99 and share[1] < 12 and min(share[2:]) > 99
