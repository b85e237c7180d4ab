"""HyLRA's hash codes: bits, distances and the choice of blocks, counted by hand."""

from __future__ import annotations

import pytest
import torch

from regard import Causal, Keys, attend
from regard.core.select import recall
from regard.core.token_select import TopTokens, tokens_layout
from regard.sparse.hylra_hash import HashBlocks, hamming, hash_codes, hash_planes


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 7, 63, 64, 65, 128])
def test_codes_are_sides_of_planes(bits):
    planes = hash_planes(128, bits, 3)
    torch.testing.assert_close(planes.T @ planes, torch.eye(bits, dtype=torch.float64))
    assert torch.equal(planes, hash_planes(128, bits, 3))
    a, b = rand(9, 128), rand(9, 128, seed=1)
    codes = hash_codes(a, planes), hash_codes(b, planes)
    assert codes[0].shape == (9, -(-bits // 64))
    differ = ((a @ planes > 0) != (b @ planes > 0)).sum(-1)
    assert torch.equal(hamming(*codes), differ)
    words = [[x % 2**64 for x in row] for row in (codes[0] ^ codes[1]).tolist()]
    assert [sum(x.bit_count() for x in row) for row in words] == differ.tolist()


def by_hand(q, k, keep, block, bits, sinks, recent, share, seed, allowed):
    """Chosen blocks of each (batch, group, row)."""
    (b, h, n, d), (hkv, m) = q.shape, k.shape[1:3]
    planes = hash_planes(d, bits, seed)
    sides_q, sides_k = q @ planes > 0, k @ planes > 0
    group, found = h // hkv, {}
    for e in range(b):
        for row in range(n):
            tables = []
            for g in range(hkv):
                near = {}
                for j in range(m):
                    if allowed[e, row, j]:
                        heads = range(g * group, (g + 1) * group)
                        far = sum(
                            int((sides_q[e, x, row] != sides_k[e, g, j]).sum()) for x in heads
                        )
                        near[j // block] = min(near.get(j // block, 10**9), far)
                tables.append(near)
            if share == "all":
                tables = [{x: min(t[x] for t in tables) for x in tables[0]}]
            for g, near in enumerate(tables):
                ranked = sorted(near)
                forced = {x for x in ranked if x < sinks} | set(ranked[-recent:] if recent else ())
                rest = sorted(set(ranked) - forced, key=lambda x: (near[x], x))
                found[e, g, row] = forced | set(rest[: max(0, keep - len(forced))])
    return found


@pytest.mark.parametrize("share", ["kv", "all"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 27), (5, 30), (14, 14)])
@pytest.mark.parametrize(
    ("keep", "block", "sinks", "recent"), [(3, 4, 1, 1), (2, 3, 0, 0), (4, 1, 1, 2)]
)
def test_choice_is_that_of_counted_bits(share, n, m, keep, block, sinks, recent):
    q, k = rand(2, 4, n, 16), rand(2, 2, m, 16, seed=1)
    padded = torch.ones(2, m, dtype=torch.bool)
    padded[1, : m // 3] = False
    mask = Causal() & Keys(padded)
    selector = HashBlocks(keep, block, 12, sinks, recent, share, seed=5)
    allowed = mask.dense(n, m)[:, 0]
    want = by_hand(q, k, keep, block, 12, sinks, recent, share, 5, allowed)
    dense = selector.select(q, k, mask=mask).dense()
    assert dense.shape[1] == 2 and (share == "kv" or torch.equal(dense[:, 0], dense[:, 1]))
    for (e, g, row), blocks in want.items():
        keys = {j for j in range(m) if j // block in blocks and allowed[e, row, j]}
        assert set(dense[e, g, row].nonzero().flatten().tolist()) == keys


def test_state_gives_what_a_fresh_look_gives():
    q, k = rand(2, 4, 40, 16), rand(2, 2, 40, 16, seed=1)
    selector = HashBlocks(3, 4, 16, 1, 1)
    state = selector.new_state()
    for m in (17, 18, 19, 31, 40):
        a = selector.select(q[:, :, m - 1 : m], k[:, :, :m], state=state)
        b = selector.select(q[:, :, m - 1 : m], k[:, :, :m])
        assert torch.equal(a.index, b.index)
    # The rows of a prompt are decoding steps.
    whole = selector.select(q, k).dense()
    torch.testing.assert_close(whole[:, :, -1:], a.dense())


def test_codes_find_what_attention_wants():
    g = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 1024, 64, generator=g)
    q = 4 * (k[:, :, 300:301] + 0.3 * torch.randn(1, 2, 1, 64, generator=g))
    layout = HashBlocks(4, 16, 64, 0, 0).select(q, k)
    assert 300 // 16 in layout.index[0, 0, 0].tolist()
    random = tokens_layout(torch.tensor([[[[3, 20, 40, 61]]]]), 1, 1024, block=16)
    exact = TopTokens(4, block=16, share="kv").select(q, k)
    found, chance, best = (recall(q, k, x).mean() for x in (layout, random, exact))
    assert chance < 0.1 < 0.9 < found <= best + 1e-6


def test_keeping_all_blocks_is_dense_attention():
    q, k, v = rand(2, 4, 6, 8), rand(2, 2, 21, 8, seed=1), rand(2, 2, 21, 8, seed=2)
    layout = HashBlocks(6, 4, 8).select(q, k)
    torch.testing.assert_close(attend(q, k, v, layout=layout), attend(q, k, v, mask=Causal()))


def test_later_keys_do_not_reach_earlier_rows():
    q, k = rand(1, 2, 24, 8), rand(1, 1, 24, 8, seed=1)
    selector = HashBlocks(2, 4, 8, 0, 0)
    before = selector.select(q, k).dense()
    k[:, :, 13:] *= -1
    after = selector.select(q, k).dense()
    assert torch.equal(before[:, :, :13], after[:, :, :13]) and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HashBlocks(0), "HashBlocks: keep must be an integer >= 1"),
        (lambda: HashBlocks(share="head"), "share must be 'kv' or 'all', got 'head'"),
        (lambda: HashBlocks(bits=0), "bits must be >= 1"),
        (
            lambda: HashBlocks(bits=9).select(rand(1, 1, 1, 8), rand(1, 1, 2, 8)),
            "bits must be at most the heads' width 8, got 9",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
