"""HyperAttention: its definition, what it is exact for, its estimator, causality, and its claims."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from benchmarks import hyper as bench
from tests.conformance.examples.hyper import (
    code,
    definition,
    directions,
    fast,
    levels,
    make_sets,
    slow,
)

from regard import Causal, attend
from regard.sparse.hyper import angular_lsh, hyper_attention


def tensors(n, m=None, heads=4, kv=2, d=8, dtype=torch.float64, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed + n)
    m = n if m is None else m
    shapes = (batch, heads, n, d), (batch, kv, m, d), (batch, kv, m, 6)
    return [torch.randn(*s, dtype=torch.float64, generator=g).to(dtype) for s in shapes]


@pytest.mark.parametrize("exclude_own", [True, False])
@pytest.mark.parametrize(
    ("n", "m", "block", "samples"),
    [(32, 32, 8, 5), (37, 37, 8, 5), (5, 40, 8, 7), (40, 5, 2, 7), (21, 34, 4, 0), (9, 30, 0, 4)],
)
def test_is_its_definition(n, m, block, samples, exclude_own):
    q, k, v = tensors(n, m)
    sets = make_sets(n, m, 4, block, samples, 2, False)
    options = {"block": block, "min_len": 2, "proj": directions(8), "exclude_own": exclude_own}
    out, lse = hyper_attention(
        q, k, v, samples=samples, sampled=sets or None, return_lse=True, **options
    )
    want, want_lse = definition(q, k, v, causal=False, sets=sets, **options)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("n", [1, 2, 8, 9, 17, 31, 64, 67])
@pytest.mark.parametrize(
    ("block", "samples", "min_len"), [(4, 5, 3), (4, 5, 8), (16, 3, 1), (0, 2, 2)]
)
def test_causal_is_its_definition_at_every_depth(n, block, samples, min_len):
    q, k, v = tensors(n)
    sizes = {"block": block, "samples": samples, "min_len": min_len}
    for got, want in zip(fast(q, k, v, True, **sizes), slow(q, k, v, True, **sizes), strict=True):
        torch.testing.assert_close(got, want)
    assert len(levels(n, min_len)) == max(0, math.ceil(math.log2(n / min_len)))


def test_samples_may_differ_between_batch_entries():
    q, k, v = tensors(24)
    g = torch.Generator().manual_seed(0)
    sets = [torch.randint(24, (2, 4, 5), generator=g)]
    options = {"proj": directions(8), "block": 6, "min_len": 1}
    out = hyper_attention(q, k, v, sampled=sets, **options)
    want, _ = definition(q, k, v, causal=False, sets=sets, **options)
    torch.testing.assert_close(out, want)


def test_the_hash_is_that_of_the_definition():
    x, proj = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(1)), directions(8, 6)
    codes = angular_lsh(x, proj)
    want = [code(row, proj.float()) for row in x.flatten(0, 2)]
    assert codes.flatten().tolist() == want and codes.dtype == torch.int64
    assert torch.equal(angular_lsh(x * 7, proj), codes), "the length of a row does not matter"
    # A code is the Gray code of the bits' number: numbers next to each other differ in one bit.
    axes = torch.eye(3)
    numbers = torch.tensor([[1.0 if b >> i & 1 else -1.0 for i in range(3)] for b in range(8)])
    gray = angular_lsh(numbers, axes).tolist()
    assert sorted(gray) == list(range(8))
    assert all((a ^ b).bit_count() == 1 for a, b in itertools.pairwise(gray))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("change", [{"min_len": 100}, {"block": 100, "min_len": 1}])
def test_is_exact_where_nothing_is_left_out(causal, change):
    q, k, v = tensors(50)
    out, lse = hyper_attention(q, k, v, causal=causal, return_lse=True, **change)
    want, want_lse = attend(q, k, v, mask=Causal() if causal else None, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("block", [0, 5])
def test_every_slot_drawn_once_is_exact(block):
    q, k, v = tensors(23, 31)
    slots = torch.randperm(31, generator=torch.Generator().manual_seed(2)).expand(1, 4, 31)
    out, lse = hyper_attention(
        q,
        k,
        v,
        block=block,
        min_len=1,
        sampled=[slots],
        return_lse=True,
        generator=torch.Generator(),
    )
    want, want_lse = attend(q, k, v, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("block", [0, 4])
def test_the_row_sum_is_unbiased(block):
    """The mean over every pair of slots that two draws may give is the true sum of the row."""
    m = 11
    q, k, v = tensors(13, m, batch=1)
    total = torch.zeros(1, 4, 13, dtype=torch.float64)
    for a in range(m):
        for b in range(m):
            slots = torch.tensor([a, b]).expand(1, 4, 2)
            options = {"block": block, "min_len": 1, "proj": directions(8), "sampled": [slots]}
            total += hyper_attention(q, k, v, return_lse=True, **options)[1].exp()
    whole = attend(q, k, v, return_lse=True)[1].exp()
    torch.testing.assert_close(total / m**2, whole)
    assert float((total / m**2).min()) > 0


def test_counting_the_own_block_twice_overestimates():
    q, k, v = tensors(11)
    found = {}
    for exclude in (True, False):
        found[exclude] = sum(
            hyper_attention(
                q,
                k,
                v,
                block=4,
                min_len=1,
                proj=directions(8),
                sampled=[torch.full((1, 4, 1), slot)],
                exclude_own=exclude,
                return_lse=True,
            )[1].exp()
            for slot in range(11)
        )
    heavy = hyper_attention(
        q, k, v, block=4, min_len=1, samples=0, proj=directions(8), return_lse=True
    )
    torch.testing.assert_close(found[False] - found[True], 11 * heavy[1].exp())


def test_the_same_generator_gives_the_same_output():
    q, k, v = tensors(40)
    options = {"block": 8, "samples": 4, "min_len": 5, "causal": True}

    def once(seed):
        return hyper_attention(q, k, v, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(once(0), once(0)) and not torch.allclose(once(0), once(1))
    torch.manual_seed(3)
    first = hyper_attention(q, k, v, **options)
    torch.manual_seed(3)
    assert torch.equal(first, hyper_attention(q, k, v, **options))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 30), (30, 1), (0, 7), (7, 0), (0, 0)])
@pytest.mark.parametrize("block", [0, 4])
def test_small_and_empty(n, m, block):
    q, k, v = tensors(n, m)
    out, lse = hyper_attention(q, k, v, block=block, samples=3, min_len=1, return_lse=True)
    assert out.shape == (2, 4, n, 6) and lse.shape == (2, 4, n)
    if m == 0:
        assert (out == 0).all() and (lse == -torch.inf).all()
    empty = hyper_attention(q[:0], k[:0], v[:0], block=block, samples=3, min_len=1)
    assert empty.shape == (0, 4, n, 6)


def test_no_batch_through_the_recursion():
    q, k, v = (x[:0] for x in tensors(33))
    out = hyper_attention(q, k, v, block=4, samples=3, min_len=4, causal=True)
    assert out.shape == (0, 4, 33, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_in_the_hundreds_overflows_nothing(dtype):
    q, k, v = tensors(64, dtype=dtype)
    q, k = 30 * q, 30 * k
    out, lse = hyper_attention(
        q,
        k,
        v,
        block=8,
        samples=8,
        min_len=4,
        causal=True,
        return_lse=True,
        generator=torch.Generator(),
    )
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert bool(torch.isfinite(out).all()) and float(lse.max()) > 500


def test_later_keys_and_values_do_not_reach_earlier_rows():
    q, k, v = tensors(53, dtype=torch.float32)
    options = {"block": 6, "samples": 5, "min_len": 7}
    before = fast(q, k, v, True, **options)[0]
    for at in (1, 26, 27, 40):
        later = [x.clone() for x in (k, v)]
        for x in later:
            x[:, :, at:] += 50.0
        after = fast(q, *later, True, **options)[0]
        assert torch.equal(before[:, :, :at], after[:, :, :at])
        assert not torch.allclose(before[:, :, at:], after[:, :, at:])


def test_later_queries_change_which_keys_are_heavy_but_never_show_later_keys():
    """Queries of one half are sorted together: that is the method, and no value leaks by it."""
    q, k, v = tensors(48, dtype=torch.float32)
    options = {"block": 4, "samples": 3, "min_len": 6}
    before = fast(q, k, v, True, **options)[0]
    other = q.clone()
    other[:, :, 40:] *= -1.0
    after = fast(other, k, v, True, **options)[0]
    assert torch.equal(before[:, :, :24], after[:, :, :24]), "the first half stands alone"
    assert not torch.allclose(before[:, :, 24:40], after[:, :, 24:40])


def test_gradients_also_through_the_log_sum_exp():
    q, k, v = tensors(7, heads=2, kv=1, d=2, batch=1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: fast(*x, True, block=2, samples=3, min_len=2), inputs
    )


def numbers(text):
    return [float(x) for x in re.findall(r"\d+\.?\d*", text)]


def test_planted_clusters_need_sorting_and_samples():
    rows = bench.planted(seeds=2)
    full, unsorted, blocks, drawn = (numbers(r["note"])[0] for r in rows)
    assert full < 0.9 * unsorted and unsorted < blocks < drawn
    sums = [numbers(r["note"])[3] for r in rows]
    assert sums[2] < 0.6 and all(0.9 < x < 1.1 for x in (sums[0], sums[1], sums[3]))


def test_work_grows_near_linearly():
    whole, causal = bench.growth((2048, 4096, 8192))
    assert 0.95 < numbers(whole["note"])[0] < 1.1
    # Every doubling adds one level: 256 pairs a query to 512 of an exact piece and those before.
    assert 1.2 < numbers(causal["note"])[0] < 1.45
    assert set(whole) == {"name", "ours", "theirs", "ratio", "bound", "note"}
