"""core.select: choosing blocks, layouts of what was chosen, summaries, recall."""

import pytest
import torch

from regard import Causal, Dense, Full, SlidingWindow, attend
from regard.core.select import (
    Summaries,
    block_allowed,
    choose_blocks,
    chosen_layout,
    narrow,
    recall,
)


def brute(scores, allowed, keep, sinks, recent, late):
    """The rule of choose_blocks, row by row with Python's sort."""
    out = torch.zeros_like(allowed)
    for at in torch.cartesian_prod(*(torch.arange(x) for x in scores.shape[:-1])).tolist():
        row, ok = scores[tuple(at)].tolist(), allowed[tuple(at)].nonzero()[:, 0].tolist()
        forced = {j for j in ok if j < sinks} | set(ok[-recent:] if recent else [])
        rest = sorted(
            (j for j in ok if j not in forced), key=lambda j: (-row[j], -j if late else j)
        )
        for j in [*forced, *rest[: max(0, keep - len(forced))]]:
            out[(*at, j)] = True
    return out


@pytest.mark.parametrize("prefer", ["early", "late"])
@pytest.mark.parametrize(
    ("keep", "sinks", "recent"), [(1, 0, 0), (3, 1, 1), (4, 0, 2), (2, 2, 2), (9, 1, 1)]
)
def test_choice_follows_the_rule_also_among_ties(keep, sinks, recent, prefer):
    generator = torch.Generator().manual_seed(keep)
    scores = torch.randint(0, 3, (2, 3, 5, 7), generator=generator).double()
    allowed = torch.rand(2, 3, 5, 7, generator=generator) < 0.7
    chosen = choose_blocks(scores, allowed, keep, sinks=sinks, recent=recent, prefer=prefer)
    assert torch.equal(chosen, brute(scores, allowed, keep, sinks, recent, prefer == "late"))


def test_keep_may_differ_between_rows_and_be_zero():
    scores = torch.arange(6.0).expand(1, 1, 4, 6)
    allowed = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    chosen = choose_blocks(scores, allowed, torch.tensor([0, 1, 3, 6]))
    assert chosen.sum(-1).flatten().tolist() == [0, 1, 3, 6]
    assert chosen[0, 0, 1].nonzero().item() == 5


def test_a_group_shares_what_any_of_its_heads_may_see():
    allowed = torch.zeros(1, 4, 1, 3, dtype=torch.bool)
    allowed[0, 0, 0, 0] = allowed[0, 1, 0, 2] = True
    assert narrow(allowed, 2).tolist() == [[[[True, False, True]], [[False] * 3]]]
    with pytest.raises(ValueError, match="allowed has 4 heads, which the 3 heads"):
        narrow(allowed, 3)
    with pytest.raises(ValueError, match="prefer must be 'early' or 'late', got 'x'"):
        choose_blocks(torch.zeros(1, 1, 1, 3), allowed[:, :1], 1, prefer="x")


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 37), (37, 37), (16, 50), (50, 50)])
def test_allowed_blocks_are_those_that_hold_an_allowed_pair(n, m):
    for mask in (None, Causal() & SlidingWindow(9), Full()):
        bq, bk = 8, 4
        dense = (Causal() if mask is None else mask).dense(n, m)
        dense = torch.nn.functional.pad(dense, (0, -m % bk, 0, -n % bq))
        expected = dense.unflatten(0, (-1, bq)).unflatten(2, (-1, bk)).any(3).any(1)
        assert torch.equal(block_allowed(mask, n, m, (bq, bk))[0, 0], expected)


def test_everything_chosen_is_dense_attention_and_the_layout_is_causal():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 21, 8), torch.randn(2, 2, 33, 8), torch.randn(2, 2, 33, 8)
    every = torch.ones(2, 2, 3, 5, dtype=torch.bool)
    layout = chosen_layout(every, 21, 33, (8, 7))
    torch.testing.assert_close(attend(q, k, v, layout=layout), attend(q, k, v, mask=Causal()))
    assert torch.equal(recall(q, k, layout), torch.ones(2, 4, 21))


def test_recall_is_the_mass_inside_the_layout():
    torch.manual_seed(1)
    q, k = (
        torch.randn(2, 4, 30, 8, dtype=torch.float64),
        torch.randn(2, 2, 30, 8, dtype=torch.float64),
    )
    chosen = torch.rand(2, 4, 4, 4) < 0.5
    chosen[..., 0] = True
    layout = chosen_layout(chosen, 30, 30, 8)
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    weights = scores.masked_fill(~Causal().dense(30), -torch.inf).softmax(-1)
    expected = (weights * layout.dense()).sum(-1)
    torch.testing.assert_close(recall(q, k, layout), expected)
    hidden = Dense(torch.zeros(30, 30, dtype=torch.bool))
    empty = chosen_layout(chosen, 30, 30, 8, hidden)
    assert torch.equal(recall(q, k, empty, mask=hidden), torch.ones_like(expected))


def test_summaries_are_the_same_token_by_token_and_only_new_blocks_are_reduced():
    torch.manual_seed(2)
    k = torch.randn(2, 3, 23, 4)
    reduced = []

    def mean(blocks):
        reduced.append(blocks.shape[2])
        return blocks.mean(3)

    grown = Summaries(5, mean)
    for m in range(1, 24):
        torch.testing.assert_close(
            grown.update(k[:, :, :m]), Summaries(5, mean).update(k[:, :, :m])
        )
    steps = Summaries(5, mean)
    steps.update(k[:, :, :20])
    reduced.clear()
    steps.update(k)
    assert reduced == [1]
    torch.testing.assert_close(steps.update(k[:, :, :7]), Summaries(5, mean).update(k[:, :, :7]))
    other = torch.randn(1, 3, 23, 4)
    torch.testing.assert_close(steps.update(other), Summaries(5, mean).update(other))
