"""MoA's integer program: one rule for each head, so that little is lost within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from math import lcm

import torch
from torch import Tensor

_MOST_STATES = 200_000


def plan(
    loss: Tensor,
    cost: Tensor,
    budget: float | Sequence[float] | Tensor,
    *,
    max_rules: int = 2,
    exact: bool = False,
) -> Tensor:
    """The rule of each head that loses least while the mean cost stays within the budget.

    A price on the cost is searched at which the best choice of every layer is affordable; what is
    left of the budget is then spent greedily, a layer at a time. `exact` solves the integer program
    by dynamic programming over all sums of costs, for small cases (and costs on a common grid).

    Args:
        loss: `(L, H, R)`, what each of `R` rules loses in each head.
        cost: `(R,)`, or `(C, R)` at several lengths that must all be kept.
        budget: the largest mean cost of a head, one number or `C`.
        max_rules: different rules in a layer at most.

    Returns:
        int64 `(L, H)`, ids of rules.

    Raises:
        ValueError: shapes that do not fit, no affordable plan, or too many sums for `exact`.
    """
    if loss.dim() != 3 or loss.shape[-1] != cost.shape[-1] or 0 in loss.shape:
        raise ValueError(
            f"plan: loss must be (L, H, R) for {cost.shape[-1]} rules, got {tuple(loss.shape)}"
        )
    if max_rules < 1:
        raise ValueError(f"plan: max_rules must be an integer >= 1, got {max_rules!r}")
    loss, cost = loss.double(), cost.double()
    cost = cost[None] if cost.dim() == 1 else cost
    bound = torch.as_tensor(budget, dtype=torch.float64).expand(cost.shape[0])
    total = bound * loss.shape[0] * loss.shape[1] * (1 + 1e-6)  # float32 costs round
    if exact:
        return _exact(loss, cost, total, max_rules)
    groups = torch.tensor(list(combinations(range(loss.shape[-1]), min(max_rules, loss.shape[-1]))))
    best: Tensor | None = None
    # What is scarce is not known beforehand: the lengths together, and each alone.
    directions = [(cost / bound[:, None]).mean(0), *(cost if len(cost) > 1 else [])]
    for direction in directions:
        found = _priced(loss, cost, total, direction, groups)
        if found is None:
            continue
        found = _spent(loss, cost, total, found, direction, groups)
        if best is None or _loss_of(loss, found) < _loss_of(loss, best):
            best = found
    if best is None:
        raise ValueError(
            f"plan: no rule fits the budget {budget}, the cheapest costs {cost.amin(1)}"
        )
    return best


def _loss_of(loss: Tensor, ids: Tensor) -> float:
    return float(loss.gather(-1, ids[..., None]).sum())


def _affordable(cost: Tensor, ids: Tensor, total: Tensor) -> bool:
    return bool((cost[:, ids].sum((1, 2)) <= total).all())


def _best_in_groups(price: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's best rule of each group: price `(..., P)` summed over heads, ids `(..., H, P)`."""
    worth, at = price[..., groups].min(-1)
    ids = groups.expand(*at.shape, -1).gather(-1, at[..., None])[..., 0]
    return worth.sum(-2), ids


def _choice(price: Tensor, groups: Tensor) -> Tensor:
    worth, ids = _best_in_groups(price, groups)
    at = worth.argmin(-1)
    return ids.gather(-1, at[:, None, None].expand(-1, ids.shape[1], 1))[..., 0]


def _priced(
    loss: Tensor, cost: Tensor, total: Tensor, direction: Tensor, groups: Tensor
) -> Tensor | None:
    """The best choice of each layer at the lowest price that makes the sum affordable."""
    cheapest = _choice(direction.expand_as(loss).contiguous(), groups)
    if not _affordable(cost, cheapest, total):
        return None
    found = _choice(loss, groups)
    if _affordable(cost, found, total):
        return found
    spread = float((loss.amax(-1) - loss.amin(-1)).max())
    gaps = (direction[:, None] - direction).abs()
    low, high = 0.0, 2 * spread / float(gaps[gaps > 0].min())
    found = cheapest
    for _ in range(60):
        price = (low + high) / 2
        tried = _choice(loss + price * direction, groups)
        if _affordable(cost, tried, total):
            high, found = price, tried
        else:
            low = price
    return found


def _spent(
    loss: Tensor,
    cost: Tensor,
    total: Tensor,
    ids: Tensor,
    direction: Tensor,
    groups: Tensor,
    prices: int = 9,
) -> Tensor:
    """The plan with what is left of the budget spent: the layer that gains most, until none does."""
    scale = float(
        (loss.amax(-1) - loss.amin(-1)).mean() / (direction.max() - direction.min() + 1e-300)
    )
    options, lost, spent = [], [], []
    for layer in loss:
        found = []
        for price in [0.0, *(scale * 4.0**p for p in range(-prices // 2, prices // 2 + 1))]:
            found.append(_best_in_groups(layer + price * direction, groups)[1].T)
        each = torch.cat(found)
        options.append(each)
        lost.append(layer.expand(len(each), -1, -1).gather(-1, each[..., None]).sum((1, 2)))
        spent.append(cost[:, each].sum(-1).T)
    every, losses, costs = (torch.stack(x) for x in (options, lost, spent))
    ids = ids.clone()
    while True:
        own_loss = loss.gather(-1, ids[..., None]).sum((1, 2))
        own_cost = cost[:, ids].sum(-1).T
        room = total - own_cost.sum(0)
        fits = (costs - own_cost[:, None] <= room).all(-1)
        gain = (own_loss[:, None] - losses).masked_fill(~fits, 0.0)
        at = int(gain.argmax())
        if float(gain.flatten()[at]) <= 1e-12 * float(loss.abs().max()):
            return ids
        layer, option = divmod(at, gain.shape[1])
        ids[layer] = every[layer, option]


_States = dict[tuple[int, ...], tuple[float, tuple[int, ...]]]


def _exact(loss: Tensor, cost: Tensor, total: Tensor, max_rules: int) -> Tensor:
    layers, heads, rules = loss.shape
    each, limit = _whole_numbers(cost, total)
    nothing: _States = {(0,) * len(limit): (0.0, ())}
    states = nothing
    for layer in loss.tolist():
        inside: _States = {}
        for group in combinations(range(rules), min(max_rules, rules)):
            some = nothing
            for head in layer:
                steps: _States = {}
                for rule in group:
                    _offer(steps, each[rule], head[rule], (rule,))
                some = _sums(some, steps, limit)
            for spent, (lost, ids) in some.items():
                _offer(inside, spent, lost, ids)
        states = _sums(states, inside, limit)
    if not states:
        raise ValueError(
            f"plan: no rule fits the budget, the cheapest costs {cost.amin(1).tolist()}"
        )
    return torch.tensor(min(states.values())[1]).view(layers, heads)


def _whole_numbers(cost: Tensor, total: Tensor) -> tuple[list[tuple[int, ...]], list[int]]:
    """Costs `(C, R)` as tuples of whole numbers, one a rule, and the limits in the same units.

    Sums of the same costs in another order must meet, or the program would never end.
    """
    rows, limits = [], []
    for row, most in zip(cost.tolist(), total.tolist(), strict=True):
        shares = [Fraction(x).limit_denominator(4096) for x in row]
        unit = lcm(*(share.denominator for share in shares))
        if any(abs(share - x) > 1e-6 * abs(x) for share, x in zip(shares, row, strict=True)):
            unit = 10**9
        rows.append([round(x * unit) for x in row])
        limits.append(int(most * unit))
    return list(zip(*rows, strict=True)), limits


def _offer(states: _States, spent: tuple[int, ...], lost: float, ids: tuple[int, ...]) -> None:
    if spent not in states or lost < states[spent][0]:
        states[spent] = lost, ids


def _sums(states: _States, steps: _States, limit: list[int]) -> _States:
    """All sums that are affordable, the best of those that cost the same."""
    found: _States = {}
    for spent, (lost, ids) in states.items():
        for more, (worse, rules) in steps.items():
            both = tuple(a + b for a, b in zip(spent, more, strict=True))
            if all(a <= b for a, b in zip(both, limit, strict=True)):
                _offer(found, both, lost + worse, ids + rules)
    if len(found) > _MOST_STATES:
        raise ValueError(f"plan: more than {_MOST_STATES} sums of costs, too many for exact=True")
    return found


def pareto_plans(
    losses: Tensor,
    cost: Tensor,
    budget: float | Sequence[float] | Tensor,
    *,
    max_rules: int = 2,
    points: int = 5,
) -> list[tuple[Tensor, Tensor]]:
    """Plans of which none loses more than another at every profiled length.

    Weighted sums of the lengths' losses are minimised, for weights on a grid of the simplex.

    Args:
        losses: `(P, L, H, R)`, from profiles at `P` lengths.
        cost, budget, max_rules: as :func:`plan`.
        points: steps of the grid's side; each length alone is always tried.

    Returns:
        Pairs of ids `(L, H)` and losses `(P,)`, ordered by the loss at the first length.
    """
    if losses.dim() != 4 or points < 1:
        raise ValueError(
            f"pareto_plans: losses must be (P, L, H, R) and points >= 1, got {tuple(losses.shape)} "
            f"and {points}"
        )
    losses = losses.double()
    # Lengths count alike: each loss in units of its mean range.
    size = (losses.amax(-1) - losses.amin(-1)).mean((1, 2)).clamp(min=1e-300)
    found: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for weights in _simplex(len(losses), points):
        share = torch.tensor(weights, dtype=torch.float64) / size
        ids = plan(torch.einsum("p,plhr->lhr", share, losses), cost, budget, max_rules=max_rules)
        lost = losses.gather(-1, ids.expand(len(losses), -1, -1)[..., None]).sum((1, 2, 3))
        found[tuple(ids.flatten().tolist())] = ids, lost
    plans = list(found.values())
    kept = [
        (ids, lost)
        for ids, lost in plans
        if not any(bool((other <= lost).all() and (other < lost).any()) for _, other in plans)
    ]
    return sorted(kept, key=lambda pair: pair[1].tolist())


def _simplex(parts: int, steps: int) -> list[tuple[float, ...]]:
    if parts == 1:
        return [(1.0,)]
    bars = combinations(range(steps + parts - 1), parts - 1)
    edges = ([-1, *bar, steps + parts - 1] for bar in bars)
    return [tuple((b - a - 1) / steps for a, b in pairwise(e)) for e in edges]
