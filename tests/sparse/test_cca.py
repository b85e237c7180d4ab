"""CCA-Attention against its rule written out, its limiting cases, and its cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmarks import cca as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.blocks import is_tight

from regard import Causal
from regard.sparse.cca import CCACache, cca_attention, core_tokens, group_weights
from regard.sparse.cca_parts import CoreTokens, LocalTokens, cores_seen

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}
POOLS = ("cca", "mean", "max")


def qkv(n, heads=4, kv_heads=2, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, 6), (kv_heads, 6), (kv_heads, 3))
    return [torch.randn(batch, h, n, d, generator=g, dtype=torch.float64) for h, d in shapes]


def rule(q, k, v, group, window, pool):
    """The rule of arXiv 2412.12465, one row and one head after the other, i from 1 as in the paper."""
    b, h, n, d = q.shape
    out = torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for e in range(b):
        for head in range(h):
            kk, vv = (x[e, head * k.shape[1] // h] for x in (k, v))
            for i in range(1, n + 1):
                cores = max(0, (i - window) // group)
                keys, values = [], []
                for c in range(cores):
                    part = slice(c * group, (c + 1) * group)
                    if pool == "max":
                        keys.append(kk[part].amax(0))
                        values.append(vv[part].amax(0))
                        continue
                    w = torch.full((group,), 1 / group, dtype=q.dtype)
                    if pool == "cca":
                        w = (kk[part] @ q[e, head, (c + 1) * group - 1] / d**0.5).softmax(0)
                    keys.append(w @ kk[part])
                    values.append(w @ vv[part])
                keys += [kk[j - 1] for j in range(cores * group + 1, i + 1)]
                values += [vv[j - 1] for j in range(cores * group + 1, i + 1)]
                weights = (torch.stack(keys) @ q[e, head, i - 1] / d**0.5).softmax(0)
                out[e, head, i - 1] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("n", "group", "window"), [(1, 4, 3), (29, 4, 6), (29, 4, 1), (30, 5, 5), (13, 3, 20)]
)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_is_the_papers_rule_row_by_row(n, group, window, pool, kv_heads):
    q, k, v = qkv(n, kv_heads=kv_heads)
    out = cca_attention(q, k, v, group, window, pool)
    torch.testing.assert_close(out, rule(q, k, v, group, window, pool))


@pytest.mark.parametrize("pool", POOLS)
def test_groups_of_one_and_wide_windows_are_causal_attention(pool):
    q, k, v = qkv(33)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(cca_attention(q, k, v, 1, 5, pool), full)
    torch.testing.assert_close(cca_attention(q, k, v, 4, 33, pool), full)
    # one short of the first core token: row 33 reads group 1 only from i - s >= g on
    torch.testing.assert_close(cca_attention(q, k, v, 4, 30, pool), full)
    assert not torch.allclose(cca_attention(q, k, v, 4, 29, pool), full)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_masks_are_tight_and_split_the_past(data):
    m = data.draw(st.integers(1, 60))
    n = data.draw(st.integers(1, m))
    group, window = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    block = data.draw(st.tuples(st.integers(1, 19), st.integers(1, 19)))
    local = LocalTokens(group, window)
    assert is_tight(local, n, m, block)
    exact = local.dense(n, m)
    cores = max(0, m - window) // group
    if cores:
        core = CoreTokens(group, window, m - cores)
        assert is_tight(core, n, cores, block)
        pooled = core.dense(n, cores).repeat_interleave(group, dim=1)
        pooled = F.pad(pooled, (0, m - cores * group))
        # every earlier key once: in a core token or exactly
        assert torch.equal(exact ^ pooled, Causal().dense(n, m)) and not (exact & pooled).any()
    held = exact.sum(-1)
    rows = torch.arange(m - n, m) + 1
    assert (held >= rows.clamp(max=window)).all() and (held <= window + group - 1).all()


def test_scale_reaches_both_softmaxes():
    q, k, v = qkv(25)
    torch.testing.assert_close(
        cca_attention(q * 2, k, v, 4, 6, scale=0.5 * 6**-0.5), cca_attention(q, k, v, 4, 6)
    )


def test_weights_and_pooling():
    q, k, v = qkv(22)
    w = group_weights(q, k, 5)
    assert w.shape == (2, 4, 4, 5)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 4, 4, dtype=torch.float64))
    # equal keys weigh alike, and then pooling by significance is the mean
    flat = k[:, :, :1].expand_as(k)
    keys, values = core_tokens(q, flat, v, 5, "cca")
    mean_k, mean_v = core_tokens(q, flat, v, 5, "mean")
    torch.testing.assert_close(keys, mean_k.repeat_interleave(2, dim=1))
    torch.testing.assert_close(values, mean_v.repeat_interleave(2, dim=1))
    assert core_tokens(q[:, :, :3], k[:, :, :3], v[:, :, :3], 5)[0].shape == (2, 4, 0, 6)


@pytest.mark.parametrize("pool", POOLS)
def test_dtypes_batches_and_gradients(pool):
    def fn(q, k, v):
        return cca_attention(q, k, v, 3, 4, pool)

    q, k, v = qkv(23)
    want = fn(q, k, v)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        out = fn(*(x.to(dtype) for x in (q, k, v)))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    assert fn(q[:0], k[:0], v[:0]).shape == (0, 4, 23, 3)
    small = [x.requires_grad_() for x in qkv(11, heads=2, kv_heads=1, batch=1)]
    assert torch.autograd.gradcheck(fn, small)


@pytest.mark.parametrize("pool", POOLS)
def test_later_tokens_move_no_bit(pool):
    q, k, v = (x.float() for x in qkv(26))
    before = cca_attention(q, k, v, 4, 5, pool)
    for at in range(1, 26):
        later = [torch.cat([x[:, :, :at], x[:, :, at:] + 50], 2) for x in (q, k, v)]
        out = cca_attention(*later, 4, 5, pool)
        assert torch.equal(out[:, :, :at], before[:, :, :at])
        assert not torch.equal(out[:, :, at], before[:, :, at])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("group", "window"), [(4, 6), (5, 1), (1, 3), (3, 40)])
@pytest.mark.parametrize("steps", [(30,), (1,) * 30, (13, 1, 1, 7, 8), (2, 0, 28)])
def test_decoding_is_the_whole(steps, group, window, pool):
    q, k, v = qkv(30)
    whole = cca_attention(q, k, v, group, window, pool)
    cache, done, parts = CCACache(group, window, pool), 0, []
    for n in steps:
        parts.append(cache.attend(*(x[:, :, done : done + n] for x in (q, k, v))))
        done += n
        cores, local = cache.entries
        assert cores == done // group and local <= window + group - 1
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_the_cache_holds_what_it_says_and_no_views_of_the_prompt():
    cache = CCACache(16, 64)
    x = torch.randn(1, 2, 4096, 8)
    cache.attend(x, x, x)
    cores, local = cache.entries
    assert cores == 256 and local < 64 + 16
    assert (
        cache._local is not None and cache._local[0].untyped_storage().size() == local * 2 * 8 * 4
    )


def test_growth_is_quadratic_over_g_beside_a_window():
    (row,) = benchmark.growth((256, 512, 1024, 2048), 8, 64)
    assert set(row) == COLUMNS
    first, last = row["note"].split(": ")[1].split(";")[0].split(" to ")
    assert abs(float(first) - 1) < 0.02 and abs(float(last) - 1) < 0.02
    # with g = 1 every pair is counted, and a group of 16 leaves a 16th of what grows quadratically
    all_pairs, pooled = ([benchmark.pairs(n, g, 64) for n in (16384, 32768)] for g in (1, 16))
    assert all_pairs == [n * (n + 1) // 2 for n in (16384, 32768)]
    assert 15 < (all_pairs[1] - all_pairs[0]) / (pooled[1] - pooled[0]) < 16


def test_cache_rows_print_the_saving():
    rows = benchmark.cache((256, 2048), 16, 64)
    assert all(set(row) == COLUMNS for row in rows)
    assert rows[0]["note"].startswith("16 core tokens and 64 keys instead of 256")
    assert rows[1]["note"].startswith("128 core tokens and 64 keys instead of 2048")


def test_positions_before_the_window_see_no_core():
    at = torch.arange(-3, 12)
    assert cores_seen(at, 4, 3).tolist() == [0] * 9 + [1] * 4 + [2] * 2


@pytest.mark.slow
def test_exchanged_attention_is_learnt_again():
    rows = benchmark.tune()
    before, swapped, after = (float(row["note"].split("%")[0]) for row in rows)
    assert before > 99 and swapped < 80 and after > 95


@pytest.mark.slow
def test_pooling_by_significance_is_better_than_mean_and_maximum():
    dense, one, ours, mean, largest = (
        float(row["note"].split()[0]) for row in benchmark.smollm2(windows=1)
    )
    assert abs(dense - one) < 0.01 and dense < ours < mean < largest
