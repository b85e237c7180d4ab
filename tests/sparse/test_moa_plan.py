"""MoA's integer program and its plans, against enumeration."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from regard.sparse.moa import MoAPlan, pareto_plans, pick, plan


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def enumerated(loss, cost, budget, max_rules):
    """The least loss of all assignments."""
    layers, heads, rules = loss.shape
    cost = cost[None] if cost.dim() == 1 else cost
    ids = torch.tensor(list(product(range(rules), repeat=layers * heads))).view(-1, layers, heads)
    few = torch.stack([(ids == rule).any(-1) for rule in range(rules)]).sum(0) <= max_rules
    spent, most = cost[:, ids].mean((2, 3)).T, torch.tensor(budget).double() + 1e-6
    worth = loss.expand(len(ids), -1, -1, -1).gather(-1, ids[..., None]).sum((1, 2, 3))
    return float(worth[few.all(-1) & (spent <= most).all(-1)].min())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shape", "max_rules"), [((1, 2), 2), ((2, 3), 2), ((3, 2), 1)])
def test_plans_against_enumeration(seed, shape, max_rules):
    loss = rand(*shape, 3, seed=seed).abs().sort(-1, descending=True).values
    cost = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    for budget in (0.2, 0.45, 0.7, 1.0):
        want = enumerated(loss, cost, budget, max_rules)
        ids = plan(loss, cost, budget, max_rules=max_rules, exact=True)
        assert float(loss.gather(-1, ids[..., None]).sum()) == pytest.approx(want)
        greedy = plan(loss, cost, budget, max_rules=max_rules)
        assert float(cost[greedy].mean()) <= budget + 1e-9
        assert all(len(set(row)) <= max_rules for row in greedy.tolist())
        # It may stop short of the best, by less than one head's range of losses.
        spread = float((loss[..., 0] - loss[..., -1]).max())
        assert want - 1e-9 <= float(loss.gather(-1, greedy[..., None]).sum()) <= want + spread


def test_two_lengths_both_hold():
    loss = rand(2, 2, 4, seed=3).abs()
    cost = torch.tensor([[0.1, 0.9, 0.4, 1.0], [0.9, 0.1, 0.4, 1.0]]).double()
    budget = [0.5, 0.45]
    want = enumerated(loss, cost, budget, 2)
    ids = plan(loss, cost, budget, exact=True)
    assert float(loss.gather(-1, ids[..., None]).sum()) == pytest.approx(want)
    greedy = plan(loss, cost, budget)
    assert bool((cost[:, greedy].mean((1, 2)) <= torch.tensor(budget) + 1e-6).all())


def test_greedy_is_near_the_exact_plan_of_many_heads():
    gaps = []
    for seed in range(3):
        loss = rand(8, 4, 6, seed=seed).abs().sort(-1, descending=True).values
        cost = torch.arange(1, 7) / 6
        for budget in (0.3, 0.5):
            both = [plan(loss, cost, budget, exact=exact) for exact in (True, False)]
            best, near = (float(loss.gather(-1, ids[..., None]).sum()) for ids in both)
            gaps.append(near / best - 1)
    assert min(gaps) >= -1e-9 and max(gaps) < 0.03


def test_pareto_plans_do_not_dominate_each_other():
    losses = rand(2, 3, 2, 4, seed=1).abs().sort(-1, descending=True).values
    cost = torch.tensor([0.25, 0.5, 0.75, 1.0])
    plans = pareto_plans(losses, cost, 0.5)
    assert len(plans) > 1
    for ids, lost in plans:
        torch.testing.assert_close(
            lost, losses.gather(-1, ids.expand(2, -1, -1)[..., None]).sum((1, 2, 3))
        )
        assert not any(bool((b <= lost).all() and (b < lost).any()) for _, b in plans)
    first = min(float(lost[0]) for _, lost in plans)
    alone = plan(losses[0], cost, 0.5)
    assert first <= float(losses[0].gather(-1, alone[..., None]).sum()) + 1e-9


def test_plans_are_saved_loaded_and_merged(tmp_path):
    rules = [(0.0, 0.25), (-1024.0, 0.5), (0.0, 1.0)]
    made = MoAPlan.of(torch.tensor([[0, 1, 2, 2], [0, 0, 1, 1]]), rules, block=32)
    made.save(tmp_path / "plan.json")
    assert MoAPlan.load(tmp_path / "plan.json") == made and made.shape == (2, 4)
    (tmp_path / "theirs.json").write_text('{"alphas": [[0.0, 8.0]], "betas": [[1.0, 0.5]]}')
    assert MoAPlan.load(tmp_path / "theirs.json") == MoAPlan(((0.0, 8.0),), ((1.0, 0.5),), 64)
    # At 4096 tokens the two rules of a group span 1024 and 1024, at 8192 tokens 2048 and 3072.
    merged = made.grouped(2, 8192)
    assert merged == MoAPlan.of(torch.tensor([[1, 2], [0, 1]]), rules, block=32)
    assert made.density(8192) == pytest.approx((65 * 3 + 97 * 3 + 256 * 2) / 256 / 8)
    assert made.spans(8192)[0].tolist() == [2048, 3072, 8192, 8192]
    best, scores = pick([made, merged], lambda one: one.density(8192))
    assert best is made and len(scores) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan(rand(2, 2, 3), torch.ones(4), 1.0), r"loss must be \(L, H, R\) for 4 rules"),
        (lambda: plan(rand(2, 2, 3), torch.ones(3), 0.5), "no rule fits the budget"),
        (lambda: plan(rand(2, 2, 3), torch.ones(3), 0.5, exact=True), "no rule fits the budget"),
        (lambda: plan(rand(2, 2, 3), torch.ones(3), 1.0, max_rules=0), "max_rules must be"),
        (lambda: pareto_plans(rand(2, 2, 3), torch.ones(3), 1.0), r"losses must be \(P, L, H, R\)"),
        (lambda: MoAPlan(((0.0,), (1.0, 2.0)), ((0.0,), (1.0, 2.0))), "L rows of H numbers"),
        (lambda: MoAPlan(((0.0,),), ((0.0, 1.0),)), "L rows of H numbers"),
        (lambda: MoAPlan(((0.0, 1.0),), ((0.0, 1.0),)).grouped(3, 64), "kv_heads must divide"),
        (lambda: pick([], float), "expected at least one plan"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
