"""LongHeads against the paper's algorithm with keys really moved, and its limiting cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.core.rope import rope
from regard.sparse import longheads_chunks as module
from regard.sparse.longheads_cache import (
    ChunkCache,
    ChunkFeatures,
    LongHeadsAttention,
    longheads_attention,
)
from regard.sparse.longheads_chunks import ChunkSelect, chunk_features

SMALL = ChunkSelect(3, 12, 12)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(n, heads=2, kv_heads=1, batch=1, d=6):
    sizes = ((heads, d), (kv_heads, d), (kv_heads, d))
    return [rand(batch, h, n, w, seed=s) for s, (h, w) in enumerate(sizes)]


def attention(q, k, v, at, moved, base):
    """One query `(D,)` at `at` over keys `(L, D)` at 0, 1, ... or at `moved`."""
    query = rope(q[None], torch.tensor([at]), base)
    return ((query @ rope(k, moved, base).T) * q.shape[-1] ** -0.5).softmax(-1) @ v


def algorithm(q, k, v, select, base=10000.0, exclude_self=False):
    """Section 3 of the paper for one head `(N, D)`, query by query, with new positions for all keys."""
    n, w = q.shape[0], select.window
    features = []
    for c in range(n // w):
        part, place = slice(c * w, (c + 1) * w), torch.arange(w)
        qc, kc = rope(q[part], place, base), rope(k[part], place, base)
        mean = F.scaled_dot_product_attention(qc, kc, v[part]).mean(0, keepdim=True)
        features.append(F.scaled_dot_product_attention(mean, kc, kc)[0])
    out = []
    for t in range(n):
        if t < select.start:
            rows = list(range(t + 1))
        else:
            end = t if exclude_self else t + 1
            g = end // w
            between = torch.stack([q[t] @ features[c] for c in range(1, g - 1)])
            best = between.topk(select.chunks - 3).indices + 1
            chunks = [0, *sorted(best.tolist()), g - 1]
            rows = [j for c in chunks for j in range(c * w, (c + 1) * w)]
            rows += range(g * w, end)
        at = len(rows) - 1 + (exclude_self and t >= select.start)
        out.append(attention(q[t], k[rows], v[rows], at, torch.arange(len(rows)), base))
    return torch.cat(out)


def definition(q, k, v, select, **options):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    heads = [
        [algorithm(q[b, h], k[b, h], v[b, h], select, **options) for h in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    return torch.stack([torch.stack(x) for x in heads])


@pytest.mark.parametrize(
    "select", [SMALL, ChunkSelect(1, 4, 9), ChunkSelect(4, 20, 22), ChunkSelect(3, 12, 16)]
)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_is_the_papers_algorithm(select, exclude_self, monkeypatch):
    q, k, v = qkv(32, batch=2)
    want = definition(q, k, v, select, exclude_self=exclude_self, base=100.0)
    out = longheads_attention(q, k, v, select, exclude_self=exclude_self, base=100.0)
    torch.testing.assert_close(out, want)
    monkeypatch.setattr(module, "_GROUP", 7)
    out = longheads_attention(q, k, v, select, exclude_self=exclude_self, base=100.0)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("n", [1, 11, 12])
def test_up_to_start_it_is_causal_attention(n):
    q, k, v = qkv(n, 4, 2)
    at = torch.arange(n)
    kk, vv = (x.repeat_interleave(2, 1) for x in (k, v))
    want = F.scaled_dot_product_attention(rope(q, at), rope(kk, at), vv, is_causal=True)
    torch.testing.assert_close(longheads_attention(q, k, v, SMALL), want)


def test_with_all_chunks_selected_it_is_causal_attention():
    # Rows 9 and 10 have 3 complete chunks and may read 3. `start` of a valid choice is larger, so that
    # there is something to leave out; here it is put where nothing is.
    select = ChunkSelect(3, 12, 12)
    object.__setattr__(select, "start", 9)
    q, k, v = qkv(11, 4, 2)
    at = torch.arange(11)
    kk, vv = (x.repeat_interleave(2, 1) for x in (k, v))
    want = F.scaled_dot_product_attention(rope(q, at), rope(kk, at), vv, is_causal=True)
    torch.testing.assert_close(longheads_attention(q, k, v, select), want)


def test_without_remap_it_is_masked_attention_at_true_positions():
    q, k, v = qkv(40, 4, 2)
    select = ChunkSelect(3, 12, 12, remap=False)
    features = ChunkFeatures(3).update(q, k, v, rope)
    at, rows = torch.arange(40), torch.arange(12, 40)
    choice = select.choose(q[:, :, rows], features, rows)
    keys = (choice[..., None] * 3 + torch.arange(3)).flatten(-2)
    seen = torch.zeros(1, 4, 28, 40, dtype=torch.bool).scatter(-1, keys, True)
    seen |= at // 3 == rows[:, None] // 3
    seen &= at <= rows[:, None]
    assert seen.sum(-1).max() <= 12
    kk, vv = (x.repeat_interleave(2, 1) for x in (k, v))
    turned = rope(q, at)[:, :, 12:], rope(kk, at)
    want = F.scaled_dot_product_attention(*turned, vv, attn_mask=seen)
    out = longheads_attention(q, k, v, select)[:, :, 12:]
    torch.testing.assert_close(out, want)
    moved = longheads_attention(q, k, v, SMALL)[:, :, 12:]
    assert (moved - out).abs().amax() > 1e-2


def test_chunks_that_are_chosen():
    select = ChunkSelect(2, 8, 8)
    features = torch.zeros(1, 1, 6, 1)
    features[0, 0, :, 0] = torch.tensor([-9.0, 1.0, 3.0, 2.0, -5.0, 99.0])
    q, rows = torch.ones(1, 1, 3, 1), torch.tensor([8, 9, 10])
    # Complete for t = 8: 0..3; for 9 and 10: 0..4. Chunk 5 never is.
    assert select.choose(q, features, rows)[0, 0].tolist() == [[0, 2, 3], [0, 2, 4], [0, 2, 4]]
    assert select.choose(-q, features, rows)[0, 0].tolist() == [[0, 1, 3], [0, 1, 4], [0, 1, 4]]
    excluding = select.choose(q, features, rows, exclude_self=True)
    assert excluding[0, 0].tolist() == [[0, 2, 3], [0, 2, 3], [0, 2, 4]]
    assert select.stand(rows).tolist() == [6, 5, 6]
    assert select.stand(rows, exclude_self=True).tolist() == [6, 7, 6]


@pytest.mark.parametrize("cuts", [(1,), (12, 13, 14, 29), tuple(range(1, 33))])
def test_a_cache_gives_what_the_whole_sequence_gives(cuts):
    q, k, v = qkv(33, 4, 2, batch=2)
    whole = longheads_attention(q, k, v, SMALL)
    cache, parts, start = ChunkCache(SMALL), [], 0
    for end in (*cuts, 33):
        parts.append(cache.attend(*(x[:, :, start:end] for x in (q, k, v))))
        start = end
        assert cache.length == end and cache.chunks.features.shape == (2, 4, end // 3, 6)
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_features_add_up_and_the_tail_is_none():
    q, k, v = qkv(20, 4, 2, batch=2)
    whole = ChunkFeatures(4).update(q, k, v, rope)
    state = ChunkFeatures(4)
    for start, end in ((0, 3), (3, 4), (4, 13), (13, 20)):
        features = state.update(*(x[:, :, start:end] for x in (q, k, v)), rope)
        torch.testing.assert_close(features, whole[:, :, : end // 4])
    # Features are the same wherever a chunk stands.
    moved = ChunkFeatures(4).update(*(x[:, :, 4:] for x in (q, k, v)), rope)
    torch.testing.assert_close(moved, whole[:, :, 1:])


def test_remap_keeps_distances_inside_the_length():
    # A key marked by a slow channel far back: with remap the query meets it at a distance < length.
    select, seen = ChunkSelect(3, 12, 12), []

    def spy(x, positions):
        seen.append(positions.expand(x.shape[:3]))
        return rope(x, positions)

    q, k, v = qkv(60)
    features = ChunkFeatures(3).update(q, k, v, rope)
    rows = torch.arange(40, 60)
    module._complete(q[:, :, 40:], k, v, features, rows, select, spy, False, None)
    choice = select.choose(q[:, :, 40:], features, rows)
    distance = seen[0].unflatten(2, choice.shape[2:]) - choice * 3
    assert distance.min() > 0 and distance.max() < 12
    far = rows[:, None] - choice * 3
    assert far.max() > 50


def test_dtypes_causality_gradients_and_an_empty_batch():
    q, k, v = qkv(33, 4, 2, d=8)
    want = longheads_attention(q, k, v, SMALL)
    # Low precision may choose other chunks where scores tie nearly; without a choice it may not.
    all_chunks = ChunkSelect(3, 33, 33)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        low = [x.to(dtype) for x in (q, k, v)]
        out = longheads_attention(*low, all_chunks)
        exact = longheads_attention(*(x.double() for x in low), all_chunks)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.allclose(
        longheads_attention(q.float(), k.float(), v.float(), SMALL).double(), want, atol=1e-4
    )
    low = [x.float() for x in (q, k, v)]
    before = longheads_attention(*low, SMALL)
    for at in (5, 13, 20, 32):
        moved = [x.clone() for x in low]
        for x in moved:
            x[:, :, at:] += 100.0
        assert torch.equal(longheads_attention(*moved, SMALL)[:, :, :at], before[:, :, :at])
    none = [x[:0] for x in (q, k, v)]
    assert longheads_attention(*none, SMALL).shape == (0, 4, 33, 8)
    inputs = [x[:, :1, :8, :4].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: longheads_attention(*x, ChunkSelect(1, 4, 5)), inputs, fast_mode=True
    )


def test_layer_is_its_parts():
    torch.manual_seed(0)
    layer = LongHeadsAttention(8, 4, kv_heads=2, select=SMALL, base=50.0).double()
    x = rand(2, 20, 8)
    parts = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    q, k, v = (p.unflatten(-1, (-1, 2)).transpose(1, 2) for p in parts)
    want = layer.o_proj(definition(q, k, v, SMALL, base=50.0).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want)
    cache = layer.new_cache()
    steps = [layer(x[:, t : t + 1], cache) for t in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), want)


def test_features_of_one_token_are_its_key():
    q, k, v = (rand(1, 2, 5, 1, 4, seed=s) for s in range(3))
    torch.testing.assert_close(chunk_features(q, k, v), k[:, :, :, 0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ChunkSelect(0), "window must be an integer >= 1"),
        (lambda: ChunkSelect(3, 13, 13), "a multiple of window, at least 4 times"),
        (lambda: ChunkSelect(4, 12, 12), "a multiple of window, at least 4 times"),
        (lambda: ChunkSelect(4, 16, 15), "start must be at least length, got 15 and 16"),
        (
            lambda: longheads_attention(rand(1, 1, 2, 4), *rand(2, 1, 1, 3, 4)),
            "expected as many keys as queries, got 3 and 2",
        ),
        (
            lambda: longheads_attention(*rand(2, 1, 1, 300, 4), rand(1, 1, 300, 3)),
            "v has width 3, expected that of k, 4",
        ),
        (lambda: LongHeadsAttention(8, 3), "heads must divide dim"),
        (lambda: LongHeadsAttention(8, 4, kv_heads=3), "kv_heads heads"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
