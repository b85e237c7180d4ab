"""The generic selectors: against brute force, limits, causality, decoding, and each other."""

import pytest
import torch

from regard import Causal, Full, SlidingWindow, attend
from regard.core.select import recall
from regard.sparse.generic import BlockTopK, ExactTopK, Streaming, VerticalSlash, block_mass

SELECTORS = [
    ExactTopK(3, 8),
    BlockTopK(3, 8),
    BlockTopK(3, 8, summary="bounds"),
    BlockTopK(3, 8, share="head"),
    BlockTopK(3, 8, share="all"),
    BlockTopK(6, 4, block_q=8, recent=3),
    ExactTopK(4, 8, block_q=4),
    Streaming(3, 8),
    VerticalSlash(4, 8, probe=9),
]
names = [
    f"{type(s).__name__}-{getattr(s, 'summary', '')}-{s.share}-{s.sides(99)}" for s in SELECTORS
]


def tensors(n=43, m=43, heads=4, kv=2, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(n * m)
    q, k, v = (
        torch.randn(batch, h, x, 8, dtype=dtype, generator=generator)
        for h, x in ((heads, n), (kv, m), (kv, m))
    )
    return q, k, v


def weights(q, k, mask):
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask.dense(q.shape[2], k.shape[2]), -torch.inf).softmax(-1)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 19), (20, 20), (7, 30)])
def test_block_mass_is_the_sum_of_dense_weights(n, m, monkeypatch):
    monkeypatch.setattr("regard.core.token_select._STRIP", 64)
    q, k, _ = tensors(n, m)
    dense = torch.nn.functional.pad(weights(q, k, Causal()), (0, -m % 8, 0, -n % 8))
    expected = dense.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).sum((3, 5))
    torch.testing.assert_close(block_mass(q, k, 8), expected)


@pytest.mark.parametrize("selector", SELECTORS, ids=names)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 43), (43, 43), (10, 43)])
def test_shape_budget_and_forced_blocks(selector, n, m):
    q, k, _ = tensors(n, m)
    layout = selector.select(q, k)
    # Lines may miss the forced blocks, which come on top of them.
    extra = selector.sinks + selector.recent if isinstance(selector, VerticalSlash) else 0
    assert (layout.counts <= selector.keep + extra).all() and (layout.counts >= 1).all()
    dense = layout.dense()
    rows = torch.arange(n)
    assert dense[:, :, rows, rows + m - n].all(), "every query sees itself"
    assert dense[..., 0].all(), "the first block is kept"
    assert not (dense & ~Causal().dense(n, m)).any()


@pytest.mark.parametrize("selector", SELECTORS, ids=names)
def test_a_budget_of_everything_is_dense_attention(selector):
    q, k, v = tensors()
    every = type(selector)(100, selector.block, block_q=selector.block_q, share=selector.share)
    torch.testing.assert_close(
        attend(q, k, v, layout=every.select(q, k)), attend(q, k, v, mask=Causal())
    )
    window = Causal() & SlidingWindow(11)
    torch.testing.assert_close(
        attend(q, k, v, layout=every.select(q, k, mask=window)), attend(q, k, v, mask=window)
    )


@pytest.mark.parametrize("selector", SELECTORS[:-1], ids=names[:-1])
def test_a_later_block_moves_nothing_earlier(selector):
    q, k, v = tensors()
    before = attend(q, k, v, layout=selector.select(q, k))
    for x in (q, k, v):
        x[:, :, 32:] += 3.0
    after = attend(q, k, v, layout=selector.select(q, k))
    assert torch.equal(before[:, :, :32], after[:, :, :32])
    assert not torch.equal(before[:, :, 32:], after[:, :, 32:])


@pytest.mark.parametrize("selector", SELECTORS, ids=names)
def test_decoding_with_state_chooses_as_without(selector):
    q, k, _ = tensors()
    state = selector.new_state()
    selector.select(q[:, :, :30], k[:, :, :30], state=state)
    for m in range(31, 44):
        row, keys = q[:, :, m - 1 : m], k[:, :, :m]
        kept = selector.select(row, keys, state=state)
        assert torch.equal(kept.index, selector.select(row, keys).index)


def test_the_exact_oracle_keeps_more_mass_than_any_other():
    q, k, _ = tensors(120, 120)
    mass = {
        name: recall(q, k, s.select(q, k)).mean().item()
        for name, s in zip(names, SELECTORS, strict=True)
        if s.keep == 3 and s.share == "kv" and s.sides(99) == (8, 8)
    }
    assert max(mass, key=mass.get) == names[0], mass
    assert all(0.0 < x < 1.0 for x in mass.values())


def test_block_top_k_finds_a_planted_block_and_streaming_does_not():
    q, k, _ = tensors(128, 128, dtype=torch.float32)
    k[:, :, 40:48] = 4.0
    q[:, :, 120:] = 1.0
    for selector in (BlockTopK(4, 8), BlockTopK(4, 8, summary="bounds"), ExactTopK(4, 8)):
        assert (selector.select(q, k).index[:, :, -1] == 5).any(-1).all()
    assert not (Streaming(4, 8).select(q, k).index == 5)[:, :, -1].any()
    assert (VerticalSlash(4, 8, probe=8).select(q, k).index[:, :, -1] == 5).any(-1).all()


def test_bounds_are_at_least_every_score_in_the_block():
    q, k, _ = tensors(1, 40)
    selector = BlockTopK(3, 8, summary="bounds", share="head")
    keys = selector.new_state().update(k)
    low, high = keys.repeat_interleave(2, 1).chunk(2, dim=-1)
    bound = torch.maximum(q * low, q * high).sum(-1)
    scores = (q @ k.repeat_interleave(2, 1).mT)[:, :, 0].unflatten(-1, (-1, 8))
    assert (bound[..., None] >= scores - 1e-9).all()


def test_slash_lines_follow_a_diagonal():
    n, block = 64, 8
    q = torch.zeros(1, 1, n, n)
    k = torch.eye(n)[None, None] * 40
    for i in range(24, n):
        q[0, 0, i, i - 24] = 10.0
    layout = VerticalSlash(2, block, probe=16, sinks=0, recent=1).select(q, k)
    for row in range(3, 8):
        assert row - 3 in layout.index[0, 0, row].tolist()


@pytest.mark.parametrize(
    "selector", [ExactTopK(3, 8), ExactTopK(6, 4, block_q=16), Streaming(3, 8)]
)
def test_a_few_rows_choose_one_by_one(selector):
    q, k, _ = tensors(3, 43)
    layout = selector.select(q, k)
    assert layout.block_q == 1
    for row in range(3):
        keys = k[:, :, : 41 + row]
        alone = selector.select(q[:, :, row : row + 1], keys).dense()
        assert torch.equal(layout.dense()[:, :, row : row + 1, : 41 + row], alone)


def test_uncausal_selection_may_read_ahead():
    q, k, v = tensors(32, 32)
    every = BlockTopK(4, 8).select(q, k, mask=Full())
    torch.testing.assert_close(attend(q, k, v, layout=every), attend(q, k, v))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactTopK(0), "ExactTopK: keep must be an integer >= 1, got 0"),
        (lambda: BlockTopK(4, 0), "BlockTopK: block must be an integer >= 1, got 0"),
        (lambda: BlockTopK(4, recent=0), "recent >= 1"),
        (lambda: Streaming(share="x"), "share must be 'kv', 'head' or 'all', got 'x'"),
        (lambda: BlockTopK(summary="max"), "summary must be 'mean' or 'bounds', got 'max'"),
        (lambda: VerticalSlash(probe=0), "probe must be >= 1, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
