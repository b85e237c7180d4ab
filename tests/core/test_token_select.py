"""The best keys of every row, against loops over pairs and against torch.topk."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regard import Causal, Dense, Full, Keys, SlidingWindow, attend
from regard.core import token_select
from regard.core.bias import as_bias
from regard.core.select import recall
from regard.core.token_select import TopTokens, key_mass, tokens_layout, top_tokens


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def chosen_by_hand(q, k, keep, allowed, block=1, share="head", sinks=0, recent=0, bias=None):
    """Sets of runs for every (batch, group of heads, row), pair by pair."""
    b, h, n, d = q.shape
    hkv, m = k.shape[1:3]
    size = {"head": 1, "kv": h // hkv, "all": h}[share]
    found = {}
    for e in range(b):
        for group in range(h // size):
            for row in range(n):
                mass, seen = {}, set()
                for head in range(group * size, (group + 1) * size):
                    sees = [j for j in range(m) if allowed[e, head, row, j]]
                    raw = [float(q[e, head, row] @ k[e, head * hkv // h, j]) for j in sees]
                    raw = [x / math.sqrt(d) for x in raw]
                    if bias is not None:
                        raw = [
                            x + float(bias[head, row, j]) for x, j in zip(raw, sees, strict=True)
                        ]
                    total = sum(math.exp(x) for x in raw)
                    for x, j in zip(raw, sees, strict=True):
                        mass[j // block] = mass.get(j // block, 0.0) + math.exp(x) / total
                        seen.add(j // block)
                ranked = sorted(seen)
                forced = {r for r in ranked if r < sinks}
                forced |= set(ranked[-recent:] if recent else ())
                rest = sorted(seen - forced, key=lambda r: (-mass[r], r))
                found[e, group, row] = forced | set(rest[: max(keep - len(forced), 0)])
    return found


def as_sets(index):
    return {
        (b, h, r): {x for x in index[b, h, r].tolist() if x >= 0}
        for b in range(index.shape[0])
        for h in range(index.shape[1])
        for r in range(index.shape[2])
    }


def spread(mask, b, h, n, m):
    return mask.dense(n, m).expand(b, h, n, m)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (9, 9), (3, 14), (1, 13)])
@pytest.mark.parametrize("share", ["head", "kv", "all"])
@pytest.mark.parametrize(
    ("keep", "block", "sinks", "recent"), [(4, 1, 0, 0), (3, 1, 1, 1), (2, 4, 0, 0), (3, 3, 1, 1)]
)
def test_is_the_best_of_every_row(n, m, share, keep, block, sinks, recent):
    q, k = rand(2, 4, n, 5), rand(2, 2, m, 5, seed=1)
    index = top_tokens(q, k, keep, block=block, share=share, sinks=sinks, recent=recent)
    want = chosen_by_hand(q, k, keep, spread(Causal(), 2, 4, n, m), block, share, sinks, recent)
    assert as_sets(index) == want
    # Ascending, padding behind.
    shown = torch.where(index < 0, 10**6, index)
    assert torch.equal(shown, shown.sort(-1).values)


@pytest.mark.parametrize("share", ["head", "kv", "all"])
def test_what_the_mask_forbids_is_out_before_the_choice(share):
    q, k = rand(2, 4, 7, 5), rand(2, 2, 11, 5, seed=1)
    padded = torch.ones(2, 11, dtype=torch.bool)
    padded[1, :6] = False
    for mask in (
        Causal() & Keys(padded),
        SlidingWindow(3),
        Full(),
        Dense(rand(2, 4, 7, 11, seed=2) > 0.3),
    ):
        allowed = spread(mask, 2, 4, 7, 11)
        index = top_tokens(q, k, 3, mask=mask, share=share)
        assert as_sets(index) == chosen_by_hand(q, k, 3, allowed, share=share)
        dense = tokens_layout(index, 7, 11, mask=mask).dense().expand(2, -1, 7, 11)
        dense = dense.repeat_interleave(4 // dense.shape[1], 1)
        assert not (dense & ~allowed).any()


def test_rows_without_keys_choose_nothing_and_read_zeros():
    q, k, v = rand(1, 2, 3, 4), rand(1, 1, 5, 4, seed=1), rand(1, 1, 5, 4, seed=2)
    mask = Keys(torch.tensor([[False, False, False, True, True]])) & Causal()
    index = top_tokens(q, k, 2, mask=mask, share="all")
    assert index[0, 0].tolist() == [[-1, -1], [3, -1], [3, 4]]
    out = attend(q, k, v, layout=tokens_layout(index, 3, 5, mask=mask))
    assert not out[:, :, 0].any() and out[:, :, 1:].abs().min() > 0


def test_a_bias_takes_part():
    q, k = rand(1, 4, 6, 5), rand(1, 2, 9, 5, seed=1)
    bias = 3 * rand(4, 6, 9, seed=2)
    for share in ("head", "kv", "all"):
        index = top_tokens(q, k, 3, share=share, bias=as_bias(bias))
        allowed = spread(Causal(), 1, 4, 6, 9)
        assert as_sets(index) == chosen_by_hand(q, k, 3, allowed, share=share, bias=bias)
    assert as_sets(index) != as_sets(top_tokens(q, k, 3, share=share))


def test_of_equals_the_earlier_wins():
    q, k = torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2)
    assert top_tokens(q, k, 2)[0, 0].tolist() == [[0, -1], *[[0, 1]] * 4]
    own = top_tokens(q, k, 2, recent=1)
    assert own[0, 0].tolist() == [[0, -1], [0, 1], [0, 2], [0, 3], [0, 4]]


def test_the_quick_way_and_the_careful_one_agree():
    allowed = spread(Causal(), 1, 4, 9, 30)
    for keep, sinks, recent in ((3, 0, 0), (5, 1, 2), (2, 2, 2), (1, 2, 2)):
        forced = {"sinks": sinks, "recent": recent}
        # Small integers tie at the edge of the choice in most rows, and are multiplied exactly.
        for high in (2, 10**6):
            q, k = (rand(1, h, x, 4, seed=h).mul(high).round() for h, x in ((4, 9), (2, 30)))
            got = as_sets(top_tokens(q / high, k / high, keep, **forced))
            assert got == chosen_by_hand(
                q / high, k / high, keep, allowed, 1, "head", sinks, recent
            )


@pytest.mark.parametrize("share", ["head", "kv", "all"])
def test_strips_change_nothing(share, monkeypatch):
    q, k = rand(2, 4, 23, 5), rand(2, 2, 29, 5, seed=1)
    whole = top_tokens(q, k, 6, share=share)
    mass = torch.cat([x for x, _ in key_mass(q, k, share=share, block=4)], 2)
    monkeypatch.setattr(token_select, "_STRIP", 5 * 2 * 4 * 29)
    assert len(list(key_mass(q, k))) == 5
    assert torch.equal(top_tokens(q, k, 6, share=share), whole)
    cut = torch.cat([x for x, _ in key_mass(q, k, share=share, block=4)], 2)
    torch.testing.assert_close(cut, mass)
    last = torch.cat([x for x, _ in key_mass(q, k, share=share, block=4, rows=7)], 2)
    torch.testing.assert_close(last, mass[:, :, -7:])


def test_mass_is_the_softmax_summed():
    q, k = rand(2, 4, 7, 5), rand(2, 2, 10, 5, seed=1)
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(5)
    weights = scores.masked_fill(~Causal().dense(7, 10), -torch.inf).softmax(-1)
    ((got, allowed),) = key_mass(q, k, block=4, share="kv")
    want = F.pad(weights, (0, 2)).view(2, 2, 2, 7, 3, 4).sum((2, -1))
    torch.testing.assert_close(got, want)
    assert torch.equal(allowed[0, 0], F.pad(Causal().dense(7, 10), (0, 2)).view(7, 3, 4).any(-1))
    ((half, _),) = key_mass(q, k, scale=0.5 / math.sqrt(5))
    want = (scores * 0.5).masked_fill(~Causal().dense(7, 10), -torch.inf).softmax(-1)
    torch.testing.assert_close(half, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_over_the_choice(dtype):
    q, k, v = (rand(2, h, 33, 8, seed=h, dtype=dtype) for h in (4, 2, 1))
    v = v.repeat(1, 2, 1, 1)
    layout = TopTokens(5).select(q, k)
    # In the precision of the inputs torch.topk finds the same keys.
    scores = q.double() @ k.repeat_interleave(2, 1).double().mT / math.sqrt(8)
    scores = scores.masked_fill(~Causal().dense(33), -torch.inf)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(5).indices, True)
    want = scores.masked_fill(~best, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1).double()
    out = attend(q, k, v, layout=layout)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    assert layout.listed_pairs() == 2 * 4 * (1 + 2 + 3 + 4 + 29 * 5)


def test_no_other_choice_of_as_many_keys_keeps_more():
    q, k = rand(1, 4, 1, 16), rand(1, 2, 200, 16, seed=1)
    best = recall(q, k, TopTokens(20).select(q, k))
    for seed in range(5):
        index = torch.stack([rand(200, seed=10 * seed + h).topk(20).indices for h in range(4)])
        other = tokens_layout(index.sort(-1).values[None, :, None], 1, 200)
        assert (recall(q, k, other) < best).all()
    together = recall(q, k, TopTokens(20, share="all").select(q, k))
    assert (together <= best + 1e-12).all() and together.sum() < best.sum()
    torch.testing.assert_close(
        recall(q, k, TopTokens(999).select(q, k)), torch.ones(1, 4, 1, dtype=torch.float64)
    )


def test_later_keys_do_not_reach_earlier_rows():
    q, k = rand(1, 4, 20, 6, dtype=torch.float32), rand(1, 2, 20, 6, seed=1, dtype=torch.float32)
    for share in ("head", "kv", "all"):
        for block in (1, 4):
            before = top_tokens(q, k, 3, share=share, block=block)
            moved = k.clone()
            moved[:, :, 11:] += 50.0
            after = top_tokens(q, moved, 3, share=share, block=block)
            assert torch.equal(before[:, :, :11], after[:, :, :11])
            assert not torch.equal(before, after)


def test_empty_calls():
    assert top_tokens(rand(0, 4, 3, 5), rand(0, 2, 3, 5), 2).shape[:3] == (0, 4, 3)
    assert top_tokens(rand(2, 4, 0, 5), rand(2, 2, 3, 5), 2, share="all").shape == (2, 1, 0, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TopTokens(0), "TopTokens: keep must be an integer >= 1, got 0"),
        (lambda: TopTokens(True), "keep must be an integer"),
        (lambda: TopTokens(2, block=0), "block must be an integer >= 1"),
        (lambda: TopTokens(2, sinks=-1), "sinks must be an integer >= 0"),
        (lambda: TopTokens(2, share="group"), "share must be one of head, kv, all, got 'group'"),
        (lambda: top_tokens(rand(1, 1, 2, 3), rand(1, 1, 2, 3), 1.5), "top_tokens: keep"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
