"""Routing attention: its definition, limits, ties, padding, and what causality covers."""

from __future__ import annotations

import re

import pytest
import torch
from benchmarks import routing as bench
from tests.conformance.examples.routing import best, centres, definition

from regard import Causal, attend
from regard.sparse.routing import routing_attention, routing_lists
from regard.sparse.routing_kmeans import route_norm


def tensors(n, m=None, heads=4, kv=2, d=8, dtype=torch.float64, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed + n)
    m = n if m is None else m
    shapes = (batch, heads, n, d), (batch, kv, m, d), (batch, kv, m, 6)
    return [torch.randn(*s, dtype=torch.float64, generator=g).to(dtype) for s in shapes]


@pytest.mark.parametrize("form", ["official", "pypi"])
@pytest.mark.parametrize(
    ("n", "m", "causal", "shared"),
    [
        (24, 24, False, False),
        (23, 23, True, True),
        (23, 23, False, True),
        (23, 23, True, False),
        (9, 30, False, False),
        (9, 30, True, False),
        (30, 9, True, False),
        (1, 1, True, True),
    ],
)
def test_is_its_definition(n, m, causal, shared, form):
    q, k, v = tensors(n, m)
    means, window = centres(4, 3, 8, form), min(5, n, m)
    out = routing_attention(q, k, v, means, window, causal=causal, share_qk=shared, form=form)
    want = definition(q, k, v, means, window, causal=causal, shared=shared, form=form)
    torch.testing.assert_close(out, want)
    assert float((want == 0).all(-1).float().mean()) < 1


@pytest.mark.parametrize("self_score", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_any_self_score_replaces_a_tokens_own(self_score, causal):
    q, _, v = tensors(20)
    means, how = centres(4, 3, 8), {"scale": 0.3, "eps": 0.5, "self_score": self_score}
    out = routing_attention(q, None, v, means, 6, causal=causal, share_qk=True, **how)
    want = definition(q, None, v, means, 6, causal=causal, shared=True, form="official", **how)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_tokens_is_full_attention(causal):
    q, _, v = tensors(33)
    out = routing_attention(q, None, v, centres(4, 1, 8), 33, causal=causal, share_qk=True)
    near = route_norm(q)
    want = attend(
        near, near, v.repeat_interleave(2, 1), mask=Causal() if causal else None, scale=1.0
    )
    torch.testing.assert_close(out, want / 1.01)


def test_as_many_clusters_as_one_sees_the_mean_of_all():
    q, k, v = tensors(12)
    one = centres(4, 1, 8)
    means = one.repeat(1, 3, 1)
    torch.testing.assert_close(
        routing_attention(q, k, v, means, 12), routing_attention(q, k, v, one, 12) * 3.03 / 3.01
    )


def test_lists_are_balanced_ascending_and_ties_go_to_the_earlier():
    x = route_norm(torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(0)))
    x = torch.cat([x, x[:, :, :20], x[:, :, 5:30]], dim=2)  # many tokens thrice
    means = centres(2, 5, 8).float()
    lists = routing_lists(x, means, 13)
    assert lists.shape == (2, 2, 5, 13) and bool((lists.diff(dim=-1) > 0).all())
    scores = x @ means.mT
    for b in range(2):
        for h in range(2):
            for c in range(5):
                want = best(scores[b, h, :, c].tolist(), 13, [True] * x.shape[2])
                assert lists[b, h, c].tolist() == want


def test_a_token_in_no_cluster_gets_zero_and_one_in_two_their_mean():
    q, k, v = tensors(30)
    means = centres(4, 2, 8)
    out = routing_attention(q, k, v, means, 7, eps=1e-9)
    count = torch.zeros(2, 4, 30).scatter_add_(
        2, routing_lists(route_norm(q), means, 7).flatten(2), torch.ones(2, 4, 14)
    )
    assert bool((out[count == 0] == 0).all()) and bool((out[count > 0] != 0).any(-1).all())
    alone = [routing_attention(q, k, v, means[:, c : c + 1], 7, eps=1e-9) for c in range(2)]
    assert set(count.unique().tolist()) == {0.0, 1.0, 2.0}
    both = (count == 2)[..., None]
    torch.testing.assert_close(out.where(both, 0), ((alone[0] + alone[1]) / 2).where(both, 0))


@pytest.mark.parametrize("form", ["official", "pypi"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_if_it_were_not_there(shared, causal, form):
    q, k, v = tensors(21)
    means = centres(4, 3, 8, form)
    real = torch.ones(2, 21, dtype=torch.bool)
    real[0, 4:6] = real[1, 6:] = False  # the second has 6 real tokens, fewer than a cluster takes
    how = {"causal": causal, "share_qk": shared, "form": form}
    out = routing_attention(q, k, v, means, 8, pad_mask=real, **how)
    assert bool((out.mT[~real[:, None, None].expand_as(out.mT)] == 0).all())
    for entry in range(2):
        kept = [x[entry : entry + 1, :, real[entry]] for x in (q, k, v)]
        alone = routing_attention(*kept, means, min(8, int(real[entry].sum())), **how)
        torch.testing.assert_close(out[entry : entry + 1, :, real[entry]], alone)
    # Nothing of a padded token matters.
    q2, k2, v2 = (x.clone() for x in (q, k, v))
    for x in (q2, k2, v2):
        x[0, :, 4:6] = 1e3
    assert torch.equal(out, routing_attention(q2, k2, v2, means, 8, pad_mask=real, **how))


def test_keys_of_another_sequence_have_a_mask_of_their_own():
    q, k, v = tensors(10, 17)
    means, real = centres(4, 3, 8), torch.rand(2, 17) < 0.7
    out = routing_attention(q, k, v, means, 5, key_mask=real)
    want = definition(q, k, v, means, 5, causal=False, shared=False, form="official", key_mask=real)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", ["official", "pypi"])
def test_no_value_of_a_later_token_is_read(shared, form):
    q, k, v = tensors(40, dtype=torch.float32)
    means, how = centres(4, 4, 8, form), {"causal": True, "share_qk": shared, "form": form}
    before = routing_attention(q, k, v, means, 12, **how)
    for at in (1, 17, 39):
        later = v.clone()
        later[:, :, at:] += 100.0
        after = routing_attention(q, k, later, means, 12, **how)
        assert torch.equal(before[:, :, :at], after[:, :, :at])
        # The package's form reads its own value only where it is alone.
        assert at == 39 or not torch.equal(before, after)


def test_later_tokens_take_places_from_earlier_ones():
    """What the paper's training does, and why decoding differs: selection is not causal."""
    q, _, v = tensors(40, dtype=torch.float32)
    means = centres(4, 4, 8).float()
    before = routing_attention(q, None, v, means, 12, causal=True)
    # Later tokens far from every centroid leave the lists of earlier tokens alone, or free places.
    near = q.clone()
    near[:, :, 30:] = means[:, :1].repeat(1, 10, 1)
    after = routing_attention(near, None, v, means, 12, causal=True)
    assert not torch.equal(before[:, :, :30], after[:, :, :30])
    # With places for all, no later token can change anything.
    wide = [routing_attention(x, None, v, means, 40, causal=True) for x in (q, near)]
    assert torch.equal(wide[0][:, :, :30], wide[1][:, :, :30])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_queries(dtype):
    q, k, v = tensors(30, dtype=dtype)
    out = routing_attention(q, k, v, centres(4, 3, 8), 9)
    assert out.dtype == dtype and bool(torch.isfinite(out).all())


def test_gradients_reach_everything_but_centroids():
    q, k, v = tensors(7, heads=2, kv=1, d=3, batch=1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    means = centres(2, 3, 3).requires_grad_()
    for form, shared in (("official", False), ("pypi", True)):
        assert torch.autograd.gradcheck(
            lambda *x, form=form, shared=shared: routing_attention(
                *x, means, 4, causal=True, share_qk=shared, form=form
            ),
            inputs,
        )
    routing_attention(q, k, v, means, 4).sum().backward()
    assert means.grad is None


def test_no_sequence():
    q, k, v = (x[:0] for x in tensors(9))
    for how in ({}, {"causal": True}, {"causal": True, "share_qk": False}):
        assert routing_attention(q, k, v, centres(4, 3, 8), 4, **how).shape == (0, 4, 9, 6)


def numbers(text):
    return [float(x) for x in re.findall(r"\d+\.?\d*", text)]


def test_learned_clusters_lose_less_than_random_ones():
    random, learned = (numbers(r["note"]) for r in bench.planted(steps=20, seeds=1))
    assert learned[0] < 0.7 * random[0] and learned[1] < random[1] / 2 and random[1] > 10


def test_work_grows_as_the_power_of_one_and_a_half():
    (row,) = bench.growth((256, 1024, 4096))
    assert "pairs grow as N^1.50, with the routing N^1.50; 2.00 to 2.00 of N^1.5" in row["note"]
    (row,) = bench.decoding((64, 128, 256), clusters=4, window=8)
    few = numbers(row["note"])
    assert few[0] > few[1] > few[2] and row["note"].endswith("32 are held")


def test_training_reports_every_kind():
    rows = bench.recall(steps=1, trials=2)
    assert len(rows) == 3 and all("right after 1 steps" in r["note"] for r in rows)
