"""HiP against its algorithm in plain Python, its limiting cases, and in running models."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks import hip as benchmark
from benchmarks.smollm2_docs import documents
from tests.conformance.examples.hip import kept, pairs
from tests.core.dense import dense_attention
from tests.models.tiny import make

import regard
from regard import Causal, Full, Keys, SlidingWindow, attend
from regard.core.select import recall
from regard.sparse.hip import HiP, HipState, hip_attention, hip_blocks, hip_select

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_lists(blocks):
    return [[[[x for x in row if x >= 0] for row in h] for h in b] for b in blocks.tolist()]


SIZES = [
    dict(mask_k=8, block_q=4, block_k=2, window=4),
    dict(mask_k=6, block_q=1, block_k=2, window=3),
    dict(mask_k=12, block_q=8, block_k=4, window=0),
    dict(mask_k=5, block_q=16, block_k=1, window=7),
    dict(mask_k=16, block_q=8, block_k=16, window=5),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (70, 70), (1, 90), (9, 83), (33, 33), (97, 97)])
def test_keeps_the_blocks_of_the_algorithm(n, m, sizes):
    for dtype in (torch.float64, torch.float32):
        q, k = rand(2, 4, n, 8).to(dtype), rand(2, 2, m, 8, seed=1).to(dtype)
        blocks, _, _ = hip_blocks(q, k, **sizes)
        assert as_lists(blocks) == kept(q.double(), k.double(), **sizes)
        layout = hip_select(q, k, **sizes)
        assert torch.equal(layout.dense(), pairs(q.double(), k.double(), **sizes))
    v = rand(2, 2, m, 5, seed=2)
    want = dense_attention(q.double(), k.double(), v, pairs(q.double(), k.double(), **sizes))[0]
    torch.testing.assert_close(hip_attention(q.double(), k.double(), v, **sizes), want)


def test_strips_do_not_change_the_choice(monkeypatch):
    from regard.sparse import hip_search

    q, k = rand(2, 2, 80, 4), rand(2, 1, 80, 4, seed=1)
    whole = hip_blocks(q, k, **SIZES[0])[0]
    monkeypatch.setattr(hip_search, "_STRIP", 1)
    assert torch.equal(hip_blocks(q, k, **SIZES[0])[0], whole)


def test_equal_scores_are_won_by_the_earlier_half():
    q, k = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 33, 2)
    blocks, _, _ = hip_blocks(q, k, mask_k=4, block_q=1, block_k=1, window=1)
    assert blocks.flatten().tolist() == [0, 1, 2, 3]


def test_a_key_that_is_no_number_spoils_only_its_readers():
    q, k, v = (rand(1, 2, 40, 4, seed=x) for x in range(3))
    k[:, :, 7] = torch.nan
    sizes = SIZES[1]
    out = hip_attention(q, k, v, **sizes)
    reads = hip_select(q, k, **sizes).dense()[0, :, :, 7]
    assert reads.any() and not reads.all()
    assert torch.equal(out[0].isnan().all(-1), reads)
    assert (hip_blocks(q, torch.full_like(k, torch.nan), **sizes)[0][0, 0, -1] >= 0).all()


def test_no_search_is_dense():
    q, k, v = rand(1, 4, 50, 8), rand(1, 2, 50, 8, seed=1), rand(1, 2, 50, 8, seed=2)
    for mask_k, window in ((50, 0), (64, 8), (42, 8)):
        out = hip_attention(q, k, v, mask_k=mask_k, window=window, block_q=8)
        torch.testing.assert_close(out, attend(q, k, v, mask=Causal()))


def test_one_round_is_the_exact_top_k():
    # With kb < n <= 2 kb every block is the first of a half, so all of them are compared.
    q, k = rand(1, 3, 8, 4), rand(1, 3, 44, 4, seed=1)
    blocks, start, _ = hip_blocks(q, k, mask_k=24, block_q=8, block_k=2, window=4)
    assert start.item() == 40
    best = (q[:, :, 1::2] @ k[:, :, :40].mT).amax(2).unflatten(-1, (20, 2)).amax(-1)
    want = best.topk(12).indices.sort(-1).values
    assert torch.equal(blocks[:, :, 0], want)


def test_finds_more_than_chance_on_smooth_keys():
    # Keys that drift slowly: a block tells of its neighbours.
    m, d = 1024, 16
    walk = rand(1, 2, m, d, seed=3).cumsum(2)
    k = walk / walk.norm(dim=-1, keepdim=True) * 6
    q = k[:, :, torch.randperm(m, generator=torch.Generator().manual_seed(4))][:, :, :32] * 2
    layout = hip_select(q, k, mask_k=64, block_q=1, block_k=2, window=16)
    chance = torch.rand(1, 2, 32, 512, generator=torch.Generator().manual_seed(5)).argsort(-1)
    last = torch.arange(504, 512).expand(1, 2, 32, 8)
    random = regard.BlockLayout.from_index(
        torch.cat([chance[..., :32], last], -1), 32, m, (1, 2), Causal()
    )
    found, lucky = (recall(q, k, x).mean().item() for x in (layout, random))
    assert found > 0.5 and found > 3 * lucky


def test_no_later_block_has_a_say():
    q, k, v = (rand(1, 2, 64, 8, seed=x) for x in range(3))
    sizes = SIZES[0]
    before = hip_attention(q, k, v, **sizes)
    for x in (q, k, v):
        x[:, :, 32:] += 100.0
    assert torch.equal(before[:, :, :32], hip_attention(q, k, v, **sizes)[:, :, :32])


def test_masks_bound_the_search():
    q, k, v = rand(1, 2, 40, 8), rand(1, 2, 40, 8, seed=1), rand(1, 2, 40, 8, seed=2)
    sizes = SIZES[1]
    # Everything visible: cross-attention, searched to the last key.
    across = hip_blocks(q[:, :, :6], k, **{**sizes, "window": 0}, mask=Full())[0]
    for row in range(6):
        alone = hip_blocks(q[:, :, row : row + 1], k, **{**sizes, "window": 0})[0]
        assert torch.equal(across[:, :, row], alone[:, :, 0])
    # Padding at the left, whole blocks of it: the real tokens choose as they do alone.
    valid = torch.ones(1, 40, dtype=torch.bool)
    valid[:, :8] = False
    padded = hip_blocks(q, k, **sizes, mask=Causal() & Keys(valid))[0]
    alone = hip_blocks(q[:, :, 8:], k[:, :, 8:], **sizes)[0]
    assert torch.equal(torch.where(alone < 0, -1, alone + 4), padded[:, :, 8:])
    # An odd number of them: nothing padded is read, and where all is kept the result is dense.
    valid[:, 8] = False
    mask = Causal() & Keys(valid)
    assert not hip_select(q, k, **sizes, mask=mask).dense()[..., :9].any()
    everything = hip_attention(q, k, v, mask_k=40, block_q=4, mask=mask)
    torch.testing.assert_close(everything, attend(q, k, v, mask=mask))
    # A band is searched inside; a mask without a closed form is looked at pair by pair.
    band = Causal() & SlidingWindow(15)
    inside = hip_select(q, k, **sizes, mask=band)
    assert not (inside.dense() & ~band.dense(40)).any()
    given = regard.Dense(band.dense(40))
    assert torch.equal(hip_select(q, k, **sizes, mask=given).dense(), inside.dense())


def test_sizes_that_leave_nothing():
    for n, m, batch in ((0, 5, 1), (1, 1, 1), (3, 3, 0), (5, 2, 1)):
        q, k, v = rand(batch, 2, n, 4), rand(batch, 1, m, 4), rand(batch, 1, m, 3)
        out = hip_attention(q, k, v, **SIZES[0])
        assert out.shape == (batch, 2, n, 3)
        want = attend(q, k, v, mask=Causal())
        torch.testing.assert_close(out, want)


def test_a_search_serves_several_steps_while_the_window_moves():
    k = rand(1, 2, 80, 8)
    selector = HiP(8, window=4, refresh=3)
    state = selector.new_state()
    assert isinstance(state, HipState)
    lists = []
    for m in range(60, 66):
        q = rand(1, 2, 1, 8, seed=m)
        dense = selector.select(q, k[:, :, :m], state=state).dense()[0, :, 0]
        assert dense[:, m - 4 :].all()
        old = dense.clone()
        old[:, m - 4 :] = False
        lists.append(old)
        fresh = hip_select(q, k[:, :, :m], mask_k=8, block_q=32, block_k=2, window=4).dense()
        if m in (60, 63):
            assert torch.equal(dense, fresh[0, :, 0])
    assert torch.equal(lists[0][:, :56], lists[1][:, :56])
    assert torch.equal(lists[0][:, :56], lists[2][:, :56])
    assert not torch.equal(lists[0][:, :56], lists[3][:, :56])
    # Another cache, shorter or of another batch, is searched anew; so is a prompt.
    for q, keys in ((rand(1, 2, 1, 8), k[:, :, :50]), (rand(2, 2, 1, 8), rand(2, 2, 65, 8))):
        want = hip_select(q, keys, mask_k=8, block_q=32, block_k=2, window=4).dense()
        assert torch.equal(selector.select(q, keys, state=state).dense(), want)


def test_gradients_flow_through_what_is_kept():
    q, k, v = (rand(1, 2, 11, 3, seed=x).requires_grad_() for x in range(3))
    assert torch.autograd.gradcheck(
        lambda q, k, v: hip_attention(q, k, v, mask_k=2, block_q=2, block_k=1, window=2),
        (q, k, v),
        fast_mode=True,
    )


def test_half_precision_chooses_as_its_rounded_inputs_do():
    q, k = rand(1, 2, 64, 8).bfloat16(), rand(1, 2, 64, 8, seed=1).bfloat16()
    low, high = (hip_blocks(x, y, **SIZES[0])[0] for x, y in ((q, k), (q.float(), k.float())))
    assert torch.equal(low, high)


def test_runs_in_a_model_cached_as_uncached():
    model = make("llama")
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    strict = HiP(4, block_q=1, block_k=1, window=4)
    with torch.no_grad(), regard.patch(model, strict):
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :15], use_cache=True)
        cache, steps = first.past_key_values, [first.logits]
        for at in range(15, 24):
            step = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    with torch.no_grad():
        dense = model(ids).logits
        assert not torch.allclose(dense, whole, atol=1e-4)
        with regard.patch(model, HiP(24, block_q=4, block_k=2, window=2)):
            torch.testing.assert_close(model(ids).logits, dense)


def test_generates_with_padding_and_refresh():
    model = make("llama")
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :4] = 0
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with regard.patch(model, HiP(4, block_q=1, block_k=2, window=4)):
        both = model.generate(ids, attention_mask=attention_mask, **settings)
        alone = model.generate(ids[:1, 4:], attention_mask=attention_mask[:1, 4:], **settings)
    assert torch.equal(both[0, 20:], alone[0, 16:])
    with regard.patch(model, HiP(4, block_q=8, window=4, refresh=3), layers=[1]):
        out = model.generate(ids, attention_mask=attention_mask, **settings)
    assert out.shape == (2, 26)


def test_growth_is_n_log_n():
    pairs_, flops = benchmark.work((1024, 4096), block_k=2)
    assert 1.0 <= math.log(pairs_[1] / pairs_[0], 4) < 1.15
    assert 1.2 < math.log(flops[1] / flops[0], 4) < 1.7
    rows = benchmark.growth((1024, 2048))
    assert all(set(row) == COLUMNS for row in rows)


@pytest.mark.slow
def test_smollm2_reads_and_writes_with_it():
    dense, hip, sinks, window = (
        float(row["note"].split()[0]) for row in benchmark.language(windows=2)
    )
    assert dense < hip < sinks < window and hip - dense < 0.5 * (sinks - dense)
    model, (ids,) = documents(1, 700)
    settings = dict(max_new_tokens=16, do_sample=False, pad_token_id=0)
    want = model.generate(ids, **settings)[0, 700:]
    with regard.patch(model, HiP(1024, window=32)):
        everything = model.generate(ids, **settings)[0, 700:]
    assert torch.equal(everything, want)
    with regard.patch(model, HiP(128, window=64, refresh=4), layers=benchmark.LAYERS):
        some = model.generate(ids, **settings)[0, 700:]
    assert (some == want)[:4].all()
