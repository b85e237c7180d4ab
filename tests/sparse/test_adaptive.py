"""A layer's budget divided among its heads: against brute force, limits, causality, decoding."""

import pytest
import torch

from regard import Causal, attend
from regard.core.select import block_allowed, recall
from regard.sparse.adaptive import AdaptiveTopK
from regard.sparse.generic import BlockTopK

from .test_generic import tensors


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 43), (43, 43), (10, 43)])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_largest_shares_of_all_heads_are_kept(n, m, floor):
    q, k, _ = tensors(n, m)
    selector = AdaptiveTopK(3, 8, floor=floor, sinks=0, recent=1)
    layout = selector.select(q, k)
    allowed = block_allowed(Causal(), n, m, selector.sides(n))
    shares = selector.scores(q, k, allowed, Causal(), None)
    for b in range(q.shape[0]):
        for row in range(shares.shape[2]):
            may = allowed[0, 0, row].nonzero().flatten().tolist()
            kept = {(h, may[-1]) for h in range(4)}
            for h in range(4):
                first = sorted(may[:-1], key=lambda j: -shares[b, h, row, j].item())
                kept |= {(h, j) for j in first[: max(0, round(floor * 3) - 1)]}
            rest = [(h, j) for h in range(4) for j in may if (h, j) not in kept]
            rest.sort(key=lambda at: -shares[b, at[0], row, at[1]].item())
            kept |= set(rest[: max(0, 12 - len(kept))])
            found = {(h, j) for h in range(4) for j in layout.index[b, h, row].tolist() if j >= 0}
            assert found == kept


def test_a_whole_floor_is_block_top_k():
    q, k, _ = tensors()
    even = BlockTopK(4, 8, summary="bounds", share="head").select(q, k)
    assert torch.equal(AdaptiveTopK(4, 8, floor=1.0).select(q, k).dense(), even.dense())


def test_a_budget_of_everything_is_dense_attention():
    q, k, v = tensors()
    out = attend(q, k, v, layout=AdaptiveTopK(6, 8).select(q, k))
    torch.testing.assert_close(out, attend(q, k, v, mask=Causal()))


def test_a_head_that_looks_everywhere_reads_more():
    q, k, _ = tensors(256, 256)
    # Keys of a block are alike, so that summaries tell their weights. Head 0 spreads its attention.
    k = k[:, :, ::8].repeat_interleave(8, dim=2)
    q[:, 0], q[:, 1:] = 0.0, 8.0 * q[:, 1:]
    even, divided = (
        kind(12, 8, block_q=1, summary="bounds", share="head").select(q, k)
        for kind in (BlockTopK, AdaptiveTopK)
    )
    last = divided.counts[:, :, -1].double()
    assert (last.sum(1) == 48).all() and (last[:, 0] > last[:, 1:].mean(1)).all()
    assert recall(q, k, divided).mean() > recall(q, k, even).mean() + 0.01


def test_a_later_block_moves_nothing_earlier():
    q, k, v = tensors()
    selector = AdaptiveTopK(3, 8)
    before = attend(q, k, v, layout=selector.select(q, k))
    for x in (q, k, v):
        x[:, :, 24:] = torch.randn_like(x[:, :, 24:])
    after = attend(q, k, v, layout=selector.select(q, k))
    assert torch.equal(before[:, :, :24], after[:, :, :24])
    assert not torch.equal(before[:, :, 24:], after[:, :, 24:])


def test_decoding_with_state_chooses_as_without():
    q, k, _ = tensors()
    selector = AdaptiveTopK(3, 8)
    state = selector.new_state()
    for m in (40, 41, 43):
        row = q[:, :, m - 1 : m]
        stepped = selector.select(row, k[:, :, :m], state=state)
        assert torch.equal(stepped.dense(), selector.select(row, k[:, :, :m]).dense())


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_errors(floor):
    with pytest.raises(ValueError, match="floor must lie in"):
        AdaptiveTopK(4, floor=floor)
