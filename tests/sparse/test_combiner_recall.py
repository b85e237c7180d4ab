"""The training bed of the recall claims: its sequences, its landmarks, its repeatability."""

from __future__ import annotations

import pytest
import torch
from benchmarks.tiny_recall import ASK, LANDMARK, VALUES, Recall, accuracy, full, train
from torch import nn


def batch(task, size=200):
    return task.batch(size, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("task", [Recall(), Recall(marks=3), Recall(32, 2, 8), Recall(9, 1, 1)])
def test_sequences(task):
    ids, answer = batch(task)
    assert ids.shape == (200, task.n) and bool((ids[:, -1] == ASK).all())
    marked = (ids >= VALUES) & (ids < 2 * VALUES)
    assert bool((marked.sum(-1) == task.marks).all())
    places = torch.arange(task.n).expand_as(ids)
    last = places.masked_fill(~marked, -1).amax(-1)
    assert int(task.n - 1 - last.max()) == task.nearest
    assert torch.equal(ids.gather(1, last[:, None])[:, 0] - VALUES, answer)
    assert int(places.masked_fill(~marked, 99).amin()) == 0
    assert answer.unique().tolist() == list(range(VALUES))


def test_landmarks_close_blocks_and_leave_the_question_last():
    task = Recall(every=8)
    ids, answer = batch(task)
    marked = task.landmarks()
    assert len(marked) == 64 + 7 and marked.nonzero()[:, 0].tolist() == list(range(8, 71, 9))[:7]
    assert torch.equal((ids == LANDMARK), marked.expand_as(ids))
    plain, same = batch(Recall())
    assert torch.equal(ids[:, ~marked], plain) and torch.equal(answer, same)


def test_training_repeats_and_other_attention_takes_over():
    how = {"task": Recall(16, nearest=4), "steps": 3, "batch": 4, "quiet": True}
    a, b = (train(full, **how) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    share = accuracy(a, how["task"], trials=64)
    a.attend_with(lambda layer: lambda q, k, v: torch.zeros_like(v))
    ids, _ = batch(how["task"])
    assert 0 <= share <= 1 and not torch.equal(a(ids), b(ids))
    before = [x.clone() for x in a.parameters()]
    assert train(model=a, **how) is a
    assert not torch.equal(before[0], next(a.parameters()))
    layers = train(make_layer=lambda layer: nn.Linear(64, 64), **how)
    with pytest.raises(ValueError, match="made by make_layer"):
        layers.attend_with(full)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train(), "exactly one of"),
        (lambda: train(full, make_layer=lambda layer: nn.Linear(64, 64)), "exactly one of"),
        (lambda: Recall(8, nearest=8), "do not fit"),
        (lambda: Recall(8, marks=5, nearest=4), "do not fit"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
