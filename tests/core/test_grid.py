"""Masks on grids, against loops over coordinates written out here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from regard import Causal, attend
from regard.core import grid_layout
from regard.core.grid import GridMask
from regard.core.grid_layout import path, thicknesses

from .dense import dense_attention


@dataclass(frozen=True)
class Diamond(GridMask):
    """City-block distance below `radius` inside a residue class, optionally with text."""

    grid: tuple[int, ...]
    radius: int
    before: int = 0
    after: int = 0
    every: int = 1

    @property
    def text_before(self):
        return self.before

    @property
    def text_after(self):
        return self.after

    @property
    def steps(self):
        return (self.every,) * len(self.grid)

    def near(self, q, k):
        far = sum((x - y).abs() for x, y in zip(q, k, strict=True))
        same = torch.ones_like(far, dtype=torch.bool)
        for x, y in zip(q, k, strict=True):
            same = same & (x % self.every == y % self.every)
        return same & (far < self.radius * self.every)

    def box(self, q, k):
        nearest = farthest = 0
        for a, z, c, e in zip(q.lo, q.hi, k.lo, k.hi, strict=True):
            nearest = nearest + torch.maximum(c - z, a - e).clamp(min=0)
            farthest = farthest + torch.maximum(z - c, e - a)
        return nearest < self.radius, farthest < self.radius


def by_hand(mask):
    """The dense mask, token by token."""
    tokens = [None] * mask.before
    tokens += list(itertools.product(*(range(extent) for extent in mask.grid)))
    tokens += [None] * mask.after
    out = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, q in enumerate(tokens):
        for j, k in enumerate(tokens):
            if q is None or k is None:
                out[i, j] = True
                continue
            gaps = [abs(x - y) for x, y in zip(q, k, strict=True)]
            same = all(gap % mask.every == 0 for gap in gaps)
            out[i, j] = same and sum(gaps) < mask.radius * mask.every
    return out


MASKS = [
    Diamond((13,), 3),
    Diamond((7, 9), 3),
    Diamond((16, 16), 4),
    Diamond((5, 11), 2, before=7),
    Diamond((6, 5), 3, before=2, after=9),
    Diamond((3, 5, 4), 2, after=3),
    Diamond((9, 8), 2, every=2),
    Diamond((7, 11), 3, before=3, every=3),
    Diamond((3, 40), 5),
    Diamond((40, 3), 5),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_form_is_the_definition(mask):
    want, n = by_hand(mask), mask.tokens
    assert torch.equal(mask.dense(n), want)
    for block in (4, (8, 4), (5, 7), 16, 128):
        layout = mask.layout(n, block=block)
        assert torch.equal(layout.dense()[0, 0], want), block
    assert mask.density(n) == pytest.approx(want.float().mean().item())


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_bounds_of_the_plain_order_hold(mask):
    """Also inside an algebra of masks, whose layouts keep the order of the sequence."""
    want, n = by_hand(mask), mask.tokens
    layout = (mask & Causal()).layout(n, block=(6, 4))
    assert not layout.permuted
    assert torch.equal(layout.dense()[0, 0], want & torch.ones(n, n, dtype=torch.bool).tril())
    i0 = torch.arange(0, n, 3)
    some, every = mask.tile(
        i0[:, None], (i0 + 2).clamp(max=n - 1)[:, None], i0, (i0 + 2).clamp(max=n - 1)
    )
    for a, row in enumerate(i0.tolist()):
        for z, col in enumerate(i0.tolist()):
            piece = want[row : row + 3, col : col + 3]
            assert bool(some[a, z]) or not piece.any()
            assert not bool(every[a, z]) or piece.all()
    # A piece of text alone sees everything, and is not masked.
    assert mask.before < 3 or every[0].all()


@pytest.mark.parametrize("mask", [MASKS[1], MASKS[4], MASKS[7]], ids=str)
def test_fewer_queries_are_the_last_rows(mask):
    want, m = by_hand(mask), mask.tokens
    for n in (1, 11, m - 2):
        layout = mask.layout(n, m, (4, 8))
        assert torch.equal(layout.dense()[0, 0], want[m - n :])
    assert mask.layout(0, m, 4).index.shape[2] == 0


def test_tiles_beat_rows():
    """What the permutation is for: a diamond of 113 points in blocks of 64."""
    mask = Diamond((64, 64), 8)
    tiled = mask.layout(4096, block=64)
    rows = (mask | mask).layout(4096, block=64)
    assert tiled.permuted and not rows.permuted
    assert tiled.listed_pairs() < 0.6 * rows.listed_pairs()
    assert tiled.allowed_pairs() == rows.allowed_pairs() == int(mask.dense(4096).sum())


def test_an_order_without_gain_is_left_out():
    layout = Diamond((64, 8), 100).layout(512, block=64)
    assert not layout.permuted and layout.density == 1.0 and not layout.partial.any()


def test_text_does_not_spoil_tiles():
    """77 text tokens before the grid cost a row and a column, not all blocks."""
    plain, text = Diamond((32, 32), 4), Diamond((32, 32), 4, before=77)
    extra = text.layout(1101, block=32).listed_pairs() - plain.layout(1024, block=32).listed_pairs()
    assert extra <= 2 * 1101 * (77 + 2 * 32)


def test_blocks_with_text_are_not_masked_where_all_is_allowed():
    layout = Diamond((24, 24), 4, before=16).layout(592, block=16)
    assert layout.permuted
    assert (layout.index[0, 0, 36] >= 0).all() and not layout.partial[0, 0, 36].any()
    assert not layout.partial[layout.index == 36].any()
    # Sixteen points at the end of the path, then two text tokens of the beginning.
    mixed = Diamond((24, 24), 12, before=2).layout(578, block=20)
    assert mixed.permuted and mixed.index[0, 0, 28, 28] == 28
    assert not mixed.partial[0, 0, 28, 28]


@pytest.mark.parametrize("grid", [(9,), (7, 10), (5, 6, 7)])
@pytest.mark.parametrize("every", [1, 2])
def test_paths_visit_every_point_once_and_stay_compact(grid, every):
    mask = Diamond(grid, 2, every=every)
    for thickness in thicknesses(mask, 16):
        order = path(mask, thickness)
        assert torch.equal(order.sort().values, torch.arange(mask.points))
        at = torch.stack(mask.at(order), -1)
        same = (at[1:] % every == at[:-1] % every).all(-1)
        steps = torch.div(at[1:], every, rounding_mode="floor") - torch.div(
            at[:-1], every, rounding_mode="floor"
        )
        # A step leads to a neighbouring strip at most.
        reach = torch.tensor([2 * t for t in thickness] + [1])
        assert bool((steps.abs() <= reach)[same].all())


def test_attention_with_gradients(monkeypatch):
    monkeypatch.setattr(grid_layout, "_WORTH", 1.0)
    mask = Diamond((6, 7), 3, before=2, after=3)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 47, 5, dtype=torch.float64, generator=g) for _ in range(3))
    want = dense_attention(*(x.requires_grad_() for x in (q, k, v)), by_hand(mask))
    layout = mask.layout(47, block=(8, 4))
    assert layout.permuted
    got = attend(q, k, v, layout=layout, return_lse=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v)) for out, lse in (got, want)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_other_lengths_are_refused():
    mask = Diamond((4, 5), 2, after=3)
    with pytest.raises(ValueError, match=r"grid of 4 x 5 and 3 text tokens, 23 in all.* 20 keys"):
        mask.layout(20)
    with pytest.raises(ValueError, match="block sides must be >= 1"):
        mask.layout(23, block=0)
