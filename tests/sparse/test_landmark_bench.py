"""The claims and costs of Landmark Attention and LongHeads, as their benchmarks print them."""

from __future__ import annotations

import re

import pytest
import torch
from benchmarks import counted, landmark, longheads
from tests.models.tiny import ids, make

import regard
from regard import Causal, attend
from regard.core import row_blocks

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}


def numbers(text):
    return [float(x) for x in re.findall(r"\d+\.?\d*", text)]


def test_counting_counts_pairs():
    q, k, v = torch.randn(3, 2, 3, 40, 4)
    with counted.counted(row_blocks) as count:
        out = row_blocks.attend(q, k, v)
        assert count.pairs == 2 * 3 * 40 * 40
        row_blocks.attend(q, k, v, mask=Causal())
    torch.testing.assert_close(out, attend(q, k, v))
    # 16 x 16 blocks on and below the diagonal, the last row and column of 8.
    assert count.pairs - 9600 == 6 * (16 * 16 + 16 * 32 + 8 * 40)
    assert counted.slope([1, 2, 4], [3, 5, 48]) == 2.0


def test_counting_counts_what_an_edit_is_given():
    from regard.steer.act import ACT

    model, before = make("llama"), ACT._calibrate
    with (
        counted.edited(ACT, "_calibrate") as sizes,
        regard.patch(model, ACT(heads=[(1, 0), (1, 2)])),
    ):
        model(ids(3, 7))
        assert sizes == [3 * 2 * 7 * 7]
        model(ids(3, 5))
    assert sizes == [294, 3 * 2 * 5 * 5] and ACT._calibrate is before


def test_landmark_training_is_quadratic_and_decoding_reads_few_blocks():
    (row,) = landmark.growth_training((512, 1024, 2048))
    assert 1.6 < numbers(row["note"])[0] < 2.05 and set(row) == COLUMNS
    (row,) = landmark.growth_decoding((510, 2040, 4080), topk=2)
    few, some, many, *marks = numbers(row["note"])[:6]
    assert (few, some, many) == (101, 101, 101) and marks == [10, 40, 80]


def test_longheads_reads_the_same_number_of_keys_however_long_the_text():
    (row,) = longheads.growth((1024, 2048, 4096))
    pairs, features, share = numbers(row["note"])[:3]
    assert 0.8 < pairs < 1.4 and 1.9 < features < 2.6 and share < 1
    assert numbers(row["note"].split("token reads")[1])[:6] == [449, 449, 449, 16, 32, 64]
    assert set(row) == COLUMNS


def test_recall_reports_every_way_of_reading():
    rows = landmark.recall(steps=2, trials=4)
    assert [set(r) == COLUMNS for r in rows] == [True] * 5
    # Reading all blocks through the cache is reading all at once.
    assert numbers(rows[0]["note"])[0] == numbers(rows[1]["note"])[0]


@pytest.mark.slow
def test_few_blocks_recall_what_random_ones_do_not():
    right = [numbers(r["note"])[0] for r in landmark.recall()]
    _, whole, two, one, random = right
    assert whole > 95 and two > 90 and one > random + 10 and random < whole - 20


@pytest.mark.slow
def test_chosen_chunks_lose_less_than_a_window_of_their_length():
    dense, chosen, true, unseen, window = (
        float(r["note"].split()[1]) for r in longheads.loss(windows=1)
    )
    assert dense < chosen < window and true < window and chosen < unseen
