"""Masks against dense boolean algebra written out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import (
    Causal,
    Dense,
    Dilated,
    Documents,
    Full,
    Keys,
    Mask,
    PerHead,
    Predicate,
    Prefix,
    Rectangles,
    Shifted,
    Sinks,
    SlidingWindow,
    Strided,
)

M = 23
small = st.integers(0, 30)
ranges = st.lists(st.tuples(small, small).map(lambda x: tuple(sorted(x))), max_size=3)
bits = st.lists(st.booleans(), min_size=M, max_size=M).map(lambda x: torch.tensor(x))
ids = st.lists(st.integers(-1, 3), min_size=M, max_size=M).map(torch.tensor)


def _where(rule):
    """A rule on integers, written out pair by pair for all M x M positions."""
    return torch.tensor([[bool(rule(i, j)) for j in range(M)] for i in range(M)])


def _inside(ranges, at):
    return ranges is None or any(a <= at < z for a, z in ranges)


@st.composite
def leaves(draw):
    """A mask and its dense tensor, the latter by plain Python rules."""
    kind = draw(st.integers(0, 10))
    a, b = draw(small), draw(small)
    step = draw(st.integers(1, 7))
    if kind == 0:
        return Full(), _where(lambda i, j: True)
    if kind == 1:
        return Causal(), _where(lambda i, j: j <= i)
    if kind == 2:
        return SlidingWindow(a, b), _where(lambda i, j: i - a <= j <= i + b)
    if kind == 3:
        return Sinks(a), _where(lambda i, j: j < a)
    if kind == 4:
        return Prefix(a), _where(lambda i, j: i < a and j < a)
    if kind == 5:
        steps = range(-b, a + 1)
        return Dilated(a, step, b), _where(lambda i, j: j in {i - t * step for t in steps})
    if kind == 6:
        return Strided(step), _where(lambda i, j: (i - j) % step == 0)
    if kind == 7:
        x = draw(ids).sort().values if draw(st.booleans()) else draw(ids)
        return Documents(x), _where(lambda i, j: x[i] == x[j] and x[j] >= 0)
    if kind == 8:
        x = draw(bits)
        return Keys(x), _where(lambda i, j: x[j])
    if kind == 9:
        rows, keys = (draw(st.none() | ranges) for _ in "ij")
        rule = _where(lambda i, j: _inside(rows, i) and _inside(keys, j))
        return Rectangles(rows, keys), rule
    rule = _where(lambda i, j: (i * j) % step == 0)
    return Predicate(lambda i, j, h, b: (i * j) % step == 0), rule


trees = st.recursive(
    leaves(),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: (p[0][0] & p[1][0], p[0][1] & p[1][1])),
        st.tuples(inner, inner).map(lambda p: (p[0][0] | p[1][0], p[0][1] | p[1][1])),
        inner.map(lambda p: (~p[0], ~p[1])),
    ),
    max_leaves=4,
)
blocks = st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 20), st.integers(1, 20)))


@settings(max_examples=150, deadline=None)
@given(trees, blocks, st.integers(1, M))
def test_algebra_and_layouts_equal_dense_booleans(tree, block, n):
    mask, dense = tree
    dense = dense[M - n :]
    assert torch.equal(mask.dense(n, M), dense)
    layout = mask.layout(n, M, block)
    assert torch.equal(layout.dense()[0, 0], dense)
    assert layout.allowed_pairs() == int(dense.sum())
    assert mask.density(n, M) == pytest.approx(dense.float().mean().item())


@settings(max_examples=60, deadline=None)
@given(leaves(), blocks)
def test_layouts_of_single_masks_list_no_empty_and_no_falsely_partial_block(leaf, block):
    mask, dense = leaf
    layout = mask.layout(M, M, block)
    for row in range(layout.query_blocks):
        rows = slice(row * layout.block_q, (row + 1) * layout.block_q)
        for key in range(layout.key_blocks):
            tile = dense[rows, key * layout.block_k : (key + 1) * layout.block_k]
            at = (layout.index[0, 0, row] == key).nonzero()
            assert len(at) == int(tile.any())
            if len(at):
                assert bool(layout.partial[0, 0, row, at[0, 0]]) == (not tile.all())


def test_repr_can_be_pasted_back():
    masks = [
        Causal() & (SlidingWindow(256) | Sinks(4)),
        ~(Causal() | Prefix(3)) & Full(),
        ~Strided(4),
        PerHead([Dilated(3, 2), SlidingWindow(1, 2)]),
        Shifted(Sinks(2), 5),
        Rectangles([(2, 4), (6, 7)], [(0, 3)]) | Rectangles(keys=[(1, 2)]),
        Rectangles() & Rectangles(queries=[]),
        Documents(torch.tensor([0, 0, 1])),
        Keys(torch.tensor([[True, False]])),
        Dense(torch.tensor([[True, False]])),
    ]
    for mask in masks:
        again = eval(repr(mask))
        assert repr(again) == repr(mask)
        m = {Documents: 3, Keys: 2, Dense: 2}.get(type(mask), 9)
        n = 1 if isinstance(mask, Dense) else m
        assert torch.equal(again.dense(n, m), mask.dense(n, m))


def test_rectangles_join_what_touches():
    one = Rectangles(((1, 5),), ((6, 9),))
    assert one == Rectangles([(3, 5), (1, 3)], [(6, 8), (7, 9), (2, 2)])
    assert hash(one) == hash(Rectangles([[1, 5]], [[6, 9]]))
    assert one != Rectangles(((1, 5),)) and Rectangles().dense(3).all()


def test_a_mask_for_an_empty_batch():
    mask = Dense(torch.zeros(0, 1, 5, 5, dtype=torch.bool))
    assert mask.dense(5).shape == (0, 1, 5, 5)
    assert mask.layout(5, 5, 4).index.shape[:3] == (0, 1, 2)
    assert (Causal() & mask).layout(5, 5, 4).under(mask).index.shape[:3] == (0, 1, 2)


def test_heads_and_batch():
    mask = PerHead([Causal(), SlidingWindow(1, 1), Sinks(2)])
    assert (mask.heads, mask.batch) == (3, None)
    dense = mask.dense(6)
    assert dense.shape == (3, 6, 6)
    for h, part in enumerate(mask.parts):
        assert torch.equal(dense[h], part.dense(6))
    padded = Causal() & Keys(torch.rand(2, 6) > 0.5)
    assert padded.dense(6).shape == (2, 1, 6, 6)
    both = mask & padded
    assert (both.heads, both.batch) == (3, 2)
    assert torch.equal(both.dense(6), dense[None] & padded.dense(6))
    given_tensor = torch.rand(2, 3, 4, 6) > 0.5
    assert torch.equal(Dense(given_tensor).dense(4, 6), given_tensor)
    assert torch.equal(Dense(given_tensor).layout(4, 6, 4).dense(), given_tensor)


def test_queries_are_the_last_of_the_keys():
    whole = (Causal() & SlidingWindow(3)).dense(9)
    assert torch.equal((Causal() & SlidingWindow(3)).dense(2, 9), whole[-2:])
    assert torch.equal(Shifted(Sinks(4), 3).dense(6), Sinks(1).dense(6))
    # More queries than keys: the first rows stand before all keys.
    assert not Causal().dense(5, 3)[:2].any()


def test_flex_predicate_is_the_mask():
    mask = Causal() & (SlidingWindow(2) | Sinks(1))
    i, j = torch.arange(4)[:, None], torch.arange(9)[None]
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.flex(4, 9)(zero, zero, i, j), mask.dense(4, 9))


def test_picture_shows_the_mask():
    lines = Causal().picture(4, width=8).splitlines()
    assert lines[0][-1] == " " and lines[-1][0] == "█" and len(lines[0]) == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SlidingWindow(-1), "left must be an integer >= 0, got -1"),
        (lambda: Dilated(3, 0), "dilation must be an integer >= 1"),
        (lambda: Strided(2.5), "stride must be an integer"),
        (lambda: Sinks(True), "n must be an integer"),
        (lambda: Causal() & 3, "expected a Mask, got int"),
        (lambda: Documents(torch.rand(3)), "ids must be integers"),
        (lambda: Keys(torch.arange(3)), "valid must be a bool tensor"),
        (lambda: Keys([True]), "must be a tensor"),
        (lambda: Dense(torch.rand(3, 3)), "expected a bool tensor"),
        (lambda: PerHead([]), "non-empty list"),
        (lambda: PerHead(Causal()), "expected a list of Masks"),
        (lambda: Shifted(3, 4), "expected a Mask and an integer"),
        (lambda: PerHead([PerHead([Causal()])]), "several heads themselves"),
        (lambda: PerHead([Causal()] * 2) & PerHead([Causal()] * 3), "different heads"),
        (lambda: Documents(torch.zeros(4, dtype=torch.int64)).dense(5), "cover 4 positions"),
        (lambda: Documents(torch.zeros(4, dtype=torch.int64)).dense(5, 4), "as many keys"),
        (lambda: Keys(torch.ones(4, dtype=torch.bool)).dense(5), "covers 4 keys"),
        (lambda: Dense(torch.ones(2, 3, dtype=torch.bool)).dense(3, 3), "the tensor is 2 x 3"),
        (lambda: PerHead([Causal()] * 2).check(3, 3, heads=3), "made for heads=2"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_new_mask_needs_only_allows():
    class Even(Mask):
        def allows(self, i, j, h=0, b=0):
            return (i + j) % 2 == 0

    dense = (torch.arange(7)[:, None] + torch.arange(7)) % 2 == 0
    assert torch.equal(Even().layout(7, 7, 3).dense()[0, 0], dense)
    with pytest.raises(NotImplementedError):
        Mask().dense(3)
