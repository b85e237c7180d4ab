"""HyLRA's offline part: the profile against eager weights, the search against all subsets of resets."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.golden import adapter, load
from tests.models.tiny import ids, make

import regard
from regard.sparse.hylra import LayerProfile, ProfileProbe, ReusePlan, plan, profile
from regard.sparse.hylra_plan import best_reuse, densest, merged_overlap
from regard.sparse.hylra_profile import chunk_density, chunk_overlap, clip_outliers

DATA = Path(__file__).parents[1] / "golden" / "data"


def by_hand(weights, kv_heads, chunk, keep, sink, recent, steps):
    """Densities `(L,)` and overlaps `(L, L)` from weights `(L, H, N, N)`, as RALS computes them."""
    layers, heads, n, _ = weights.shape
    group = heads // kv_heads
    means, tables = [], []
    for h in range(kv_heads):
        ratios, table = np.zeros((steps, layers)), np.zeros((layers, layers))
        for step in range(steps):
            row = n - steps + step
            top = []
            for layer in range(layers):
                a = weights[layer, h * group : (h + 1) * group, row, : row + 1].sum(0)
                sums = [float(a[c : c + chunk].sum()) for c in range(0, len(a), chunk)]
                ranked = np.sort(sums)[::-1] / np.sum(sums)
                passed = np.searchsorted(np.cumsum(ranked), 0.9, side="right")
                ratios[step, layer] = passed / len(sums)
                forced = [float("inf")] * len(sums)
                worth = [
                    w if sink // chunk <= c < len(sums) - recent // chunk else f
                    for c, (w, f) in enumerate(zip(sums, forced, strict=True))
                ]
                top.append(set(np.argsort(worth)[::-1][: keep // chunk].tolist()))
            for i, j in itertools.combinations(range(layers), 2):
                table[i, j] += len(top[i] & top[j]) / len(top[j]) / steps
        low, high = np.quantile(ratios, 0.25, axis=0), np.quantile(ratios, 0.75, axis=0)
        reach = 1.5 * (high - low)
        means.append(np.clip(ratios, low - reach, high + reach).mean(0))
        tables.append(table + np.eye(layers))
    return np.mean(means, 0), np.min(tables, 0)


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        {"chunk": 4, "keep": 16, "sink": 4, "recent": 8, "steps": 7},
        {"chunk": 1, "keep": 5, "sink": 0, "recent": 0, "steps": 1},
        {"chunk": 5, "keep": 11, "sink": 5, "recent": 0, "steps": 12},
    ],
)
def test_profile_is_that_of_eager_weights(sizes):
    model, x = make("llama", implementation="eager"), ids(1, 45)
    weights = torch.stack(model(x, output_attentions=True).attentions)[:, 0].numpy()
    density, overlap = by_hand(weights, 2, **sizes)
    seen = profile(model, x, **sizes)
    np.testing.assert_allclose(seen.density, density, rtol=1e-12)
    np.testing.assert_allclose(seen.overlap, overlap, rtol=1e-12)
    assert (seen.chunk, seen.keep, seen.steps) == tuple(
        sizes[k] for k in ("chunk", "keep", "steps")
    )


@torch.no_grad()
def test_a_batch_is_more_steps():
    model, x = make("llama"), ids(3, 30)
    sizes = {"chunk": 4, "keep": 8, "sink": 4, "recent": 0, "steps": 5}
    both = profile(model, x, **sizes)
    probe = ProfileProbe(**sizes)
    with regard.watch(model, probe) as seen:
        for entry in range(3):
            model(x[entry : entry + 1])
    one_by_one = seen.result()
    assert both.steps == one_by_one.steps == 15
    np.testing.assert_allclose(both.density, one_by_one.density, rtol=1e-9)
    np.testing.assert_allclose(both.overlap, one_by_one.overlap, rtol=1e-9)


def test_golden_replays_at_other_sizes():
    case = load(DATA / "hylra.npz")
    # One key head, the first layers.
    case["K"], case["Q"] = case["K"][1:, :5], case["Q"][1:, :5]
    got = adapter(DATA / "hylra.npz").replay(case)
    np.testing.assert_allclose(got["hash_ratio"], case["hash_ratio"][1:, :, :5], rtol=1e-5)
    np.testing.assert_allclose(got["overlap"], case["overlap"][1:, :5, :5], rtol=1e-5)
    assert got["rollback"].shape == (2,) and got["policy"].shape == (5,)


def test_density_is_one_less_than_the_usual_count():
    even = torch.ones(1, 1, 20)
    # 18 of 20 equal chunks hold 0.9; 17 are passed before that, but for the rounding of 0.9.
    assert chunk_density(even, torch.tensor([20])).item() in (17 / 20, 18 / 20)
    lone = torch.tensor([[[0.95, 0.05, 0.0, 0.0]]])
    assert chunk_density(lone, torch.tensor([2])).item() == 0.0
    two = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    assert chunk_density(two, torch.tensor([4])).item() == 2 / 4


def test_outliers_are_clipped_as_numpy_would():
    x = torch.tensor([[0.1, 0.2, 0.2, 0.3, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    got = clip_outliers(x, -1)
    assert got[0].tolist() == pytest.approx([0.1, 0.2, 0.2, 0.3, 0.45])
    assert torch.equal(got[1], x[1])


def test_overlap_of_known_sets():
    chosen = torch.zeros(3, 1, 2, 4, dtype=torch.bool)
    for layer, (a, b) in enumerate([((0, 1), (0, 1)), ((0, 2), (2, 3)), ((0, 1), (0, 1))]):
        chosen[layer, 0, 0, list(a)] = True
        chosen[layer, 0, 1, list(b)] = True
    want = [[1.0, 0.25, 1.0], [0.0, 1.0, 0.25], [0.0, 0.0, 1.0]]
    assert chunk_overlap(chosen)[0].tolist() == want


def every_way(overlap, resets):
    """(smallest, sum) of every choice of at most `resets` later layers as sources."""
    layers = len(overlap)
    for count in range(min(resets, layers - 1) + 1):
        for own in itertools.combinations(range(1, layers), count):
            source, paid = 0, [1.0]
            for j in range(1, layers):
                source = j if j in own else source
                paid.append(1.0 if j in own else overlap[source][j])
            yield min(paid), sum(paid)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_search_is_optimal_for_the_smallest_overlap(data):
    layers = data.draw(st.integers(1, 8))
    resets = data.draw(st.integers(0, 8))
    share = st.sampled_from([0.0, 0.25, 0.5, 0.625, 0.75, 1.0])
    overlap = [[data.draw(share) for _ in range(layers)] for _ in range(layers)]
    sources, low, total = best_reuse(overlap, resets)
    best = max(every_way(overlap, resets))
    assert low == best[0] and total <= best[1]
    # What it says of its path is true of the path.
    paid = [1.0 if i == j else overlap[i][j] for j, i in enumerate(sources)]
    assert (min(paid), sum(paid)) == (low, total)
    assert sum(i == j for j, i in enumerate(sources)) <= resets + 1
    assert all(i <= j and sources[i] == i for j, i in enumerate(sources))


def test_search_by_hand():
    overlap = [[1, 0.9, 0.2, 0.1], [0, 1, 0.3, 0.3], [0, 0, 1, 0.8], [0, 0, 0, 1]]
    assert best_reuse(overlap, 1) == ([0, 0, 2, 2], 0.8, pytest.approx(3.7))
    assert best_reuse(overlap, 0) == ([0, 0, 0, 0], 0.1, pytest.approx(2.2))
    assert best_reuse(overlap, 3)[0] == [0, 1, 2, 3]


def made(layers, density, near=0.5):
    rows = tuple(
        tuple(1.0 if i == j else near / (j - i) if i < j else 0.0 for j in range(layers))
        for i in range(layers)
    )
    return LayerProfile(tuple(density), rows, 64, 2048, 64, 512, 8)


def test_plan_counts_and_roles(tmp_path):
    measured = made(10, [0.9, 0.1, 0.2, 0.1, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1])
    got = plan(measured, sparsity=0.8, rho=0.3)
    assert got.full == (0, 4) and densest(measured.density, 0.8) == (0, 4)
    # ceil(10 * 0.8 * 0.3) + 2 resets, and layer 0 for nothing.
    assert sum(source < 0 for source in got.policy) <= 3 + 2 + 1
    # After a full layer the old source is lost.
    assert got.policy[0] == got.policy[1] == got.policy[4] == got.policy[5] == -1
    assert not {source for source in got.policy if source >= 0} & {0, 4}
    regard.sparse.hylra.LayerReuse(got.policy, got.full)
    merged = merged_overlap(measured.overlap, got.full)
    assert merged[4][5] == merged[3][4] == 0 and merged[4][4] == 1 and merged[5][6] == 0.5
    got.save(tmp_path / "plan.json")
    measured.save(tmp_path / "profile.json")
    assert ReusePlan.load(tmp_path / "plan.json") == got
    assert LayerProfile.load(tmp_path / "profile.json") == measured
    lines = got.table(measured).splitlines()
    assert len(lines) == 12 and lines[2].split("|")[2].strip() == "full"
    assert sum(" reuse " in line for line in got.table().splitlines()) == sum(
        source >= 0 for source in got.policy
    )


def test_ends_of_the_plan():
    measured = made(6, [0.1] * 6)
    assert plan(measured, 0.0).full == tuple(range(6))
    nothing_full = plan(measured, 1.0, 1.0)
    assert nothing_full.full == () and nothing_full.policy == (-1,) * 6
    assert plan(measured, 1.0, 0.0).policy == (-1, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan(made(3, [1, 2, 3]), 1.5), r"sparsity must lie in \[0, 1\], got 1.5"),
        (lambda: plan(made(3, [1, 2, 3]), rho=-1), "rho must lie in"),
        (lambda: best_reuse([], 1), "overlap is empty"),
        (lambda: best_reuse([[1.0]], -1), "resets must be >= 0"),
        (lambda: ProfileProbe(keep=3, chunk=4), "keep >= chunk"),
        (lambda: ProfileProbe().result(), r"layers \[\] were read"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@torch.no_grad()
def test_what_cannot_be_profiled():
    model, x = make("llama"), ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    with (
        regard.watch(model, ProfileProbe(2, 2, 4, 0, 0)),
        pytest.raises(ValueError, match="the text is padded"),
    ):
        model(x, attention_mask=mask)
    capped = make("gemma2", implementation="eager")
    with pytest.raises(ValueError, match="layer 0 has soft-capped scores"):
        profile(capped, x, chunk=2, keep=4, sink=0, recent=0)
    assert math.isfinite(profile(model, x, chunk=2, keep=4, sink=0, recent=0).density[0])
