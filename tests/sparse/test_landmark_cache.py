"""Retrieval by landmarks against keys that are really moved, one query at a time."""

from __future__ import annotations

import pytest
import torch

from regard.core.rope import rope
from regard.sparse.landmark import landmark_attention
from regard.sparse.landmark_cache import LandmarkCache
from regard.sparse.landmark_layer import LandmarkAttention

from .test_landmark import rand, weights


def marked(n, block, first=0):
    return torch.arange(first, first + n) % (block + 1) == block


def run(cache, q, k, v, cuts):
    """The sequence in segments that end at `cuts`."""
    out, start = [], 0
    for end in (*cuts, q.shape[2]):
        part = slice(start, end)
        here = marked(end - start, cache.block, start)
        out.append(cache.attend(q[:, :, part], k[:, :, part], v[:, :, part], here))
        start = end
    return torch.cat(out, 2)


def retrieval(q, k, v, block, topk, mode, cuts, base=10000.0, moved=True):
    """What the paper does, with the keys of retrieved blocks rotated anew at their slots."""
    b, h, n, d = q.shape
    k, v = (x.repeat_interleave(h // k.shape[1], 1) for x in (k, v))
    out, period, start = torch.zeros(b, h, n, v.shape[-1]).to(v), block + 1, 0
    for end in (*cuts, n):
        count = start // period
        many = moved and count > topk
        slots = [max(0, c - (count - topk) + 1) if many else c for c in range(count)]
        first = (topk + 1 if many else count) * period
        lm = torch.arange(count) * period + block
        at = torch.tensor(slots, dtype=torch.int64) * period + block
        place = torch.arange(start, end) - count * period + first
        logits = rope(q[:, :, start:end], place, base) @ rope(k[:, :, lm], at, base).mT * d**-0.5
        share = logits.softmax(-1)
        if mode == "head":
            share = share.amax(1, keepdim=True).expand_as(share)
        if mode == "token":
            share = share.amax(2, keepdim=True).expand_as(share)
        for x, y, t in ((x, y, t) for x in range(b) for y in range(h) for t in range(start, end)):
            best = share[x, y, t - start].topk(min(topk, count)).indices.sort().values.tolist()
            rows, where = [], []
            for order, c in enumerate(best):
                slot = order + (slots[c] > 0) if many else c
                rows += range(c * period, (c + 1) * period)
                where += range(slot * period, (slot + 1) * period)
            local = range(count * period, t + 1)
            rows += local
            where += [j - count * period + first for j in local]
            keys = rope(k[x, y, rows], torch.tensor(where), base)
            query = rope(q[x, y, t : t + 1], place[t - start], base)
            flags = torch.tensor([j % period == block for j in rows])
            out[x, y, t] = (weights(query @ keys.T * d**-0.5, flags) @ v[x, y, rows])[0]
        start = end
    return out


CUTS = {"token": tuple(range(1, 26)), "segments": (7, 8, 13, 21), "once": ()}


# Rows 18, 22 and 29 of the authors' attention with their cache (epfml/landmark-attention at d963e504,
# mem_cache.py, float64, blocks of 3 and a landmark, top 2, the inputs and segments below).
AUTHORS = {
    "token_head": [
        [-4.045553, 2.019709, 1.779503, -4.016255, 2.726748, 0.950536, -3.793219, 3.305337],
        [2.952659, -3.210583, 0.649514, 2.481849, -3.94533, 2.183965, 1.49499, -3.861297],
        [-3.817971, 1.460947, 2.178834, -3.90553, -2.969432, 0.043377, 2.920765, -3.320383],
    ],
    "head": [
        [-4.045553, 2.019709, 1.779503, -4.016255, 2.726748, 0.950536, -3.793219, 3.305337],
        [2.952659, -3.210583, 0.649514, 2.481849, -3.94533, 2.183965, 1.49499, -3.861297],
        [-3.817971, 1.460947, 2.178834, -3.90553, 1.439422, 1.279243, -2.874692, 1.946071],
    ],
    "token": [
        [-4.045553, 2.019709, 1.779503, -4.016255, 2.809654, -2.746034, 0.27131, 2.441633],
        [-3.119722, 2.154966, 0.701918, -2.942496, -3.94533, 2.183965, 1.49499, -3.861297],
        [-3.817971, 1.460947, 2.178834, -3.90553, -2.969432, 0.043377, 2.920765, -3.320383],
    ],
}


@pytest.mark.parametrize("mode", AUTHORS)
def test_gives_the_authors_numbers(mode):
    x = torch.sin(torch.arange(31 * 8, dtype=torch.float64).view(1, 31, 8) * 1.7)
    weight = 1.5 * torch.cos(torch.arange(24 * 8, dtype=torch.float64).view(24, 8) * 1.3)
    heads = (x @ weight.T).unflatten(-1, (6, 4)).transpose(1, 2)
    q, k, v = heads.chunk(3, 1)
    # Theirs turns channels 2 i and 2 i + 1 as a pair, ours i and i + D / 2.
    pairs = torch.tensor([0, 2, 1, 3])
    cache = LandmarkCache(3, 2, mode)
    out = run(cache, q[..., pairs], k[..., pairs], v, (17, 18, 25, 26, 27, 30))
    got = out[0].transpose(0, 1).flatten(1)[[18, 22, 29]]
    want = torch.tensor(AUTHORS[mode], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("mode", ["token_head", "head", "token"])
def test_reads_what_the_paper_reads(cuts, mode):
    q, k, v = rand(2, 2, 26, 6), rand(2, 1, 26, 6, seed=1), rand(2, 1, 26, 3, seed=2)
    for topk in (1, 3):
        cache = LandmarkCache(4, topk, mode)
        out = run(cache, q, k, v, CUTS[cuts])
        want = retrieval(q, k, v, 4, topk, mode, CUTS[cuts])
        torch.testing.assert_close(out, want)
        assert (cache.length, cache.blocks) == (26, 5)


def test_true_distances_and_another_base():
    q, k, v = (rand(1, 2, 26, 6, seed=s) for s in range(3))
    out = run(LandmarkCache(4, 2, remap=False, base=50.0), q, k, v, CUTS["token"])
    torch.testing.assert_close(
        out, retrieval(q, k, v, 4, 2, "token_head", CUTS["token"], 50.0, False)
    )
    moved = run(LandmarkCache(4, 2, base=50.0), q, k, v, CUTS["token"])
    # Up to three closed blocks nothing stands elsewhere; the last row is far from the start.
    torch.testing.assert_close(moved[:, :, :15], out[:, :, :15])
    assert (moved[:, :, -1] - out[:, :, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("base", [None, 10000.0])
def test_reading_all_blocks_is_the_grouped_softmax(cuts, base):
    q, k, v = rand(2, 4, 26, 6), rand(2, 2, 26, 6, seed=1), rand(2, 2, 26, 3, seed=2)
    at = torch.arange(26)
    turned = (q, k) if base is None else (rope(q, at, base), rope(k, at, base))
    want = landmark_attention(*turned, v, marked(26, 4))
    for remap in (True, False):
        cache = LandmarkCache(4, 5, base=base, remap=remap)
        torch.testing.assert_close(run(cache, q, k, v, CUTS[cuts]), want)
    # Reading none leaves the local text.
    one = run(LandmarkCache(4, 0, base=base), q, k, v, CUTS["token"])
    row = 23  # its block begins at 20
    logits = (turned[0][0, 1, row] @ turned[1][0, 0, 20:24].T) * 6**-0.5
    torch.testing.assert_close(one[0, 1, row], logits.softmax(0) @ v[0, 0, 20:24])


def test_the_newest_block_keeps_its_true_distance():
    q, k, v = (rand(1, 1, 29, 8, seed=s) for s in range(3))
    # The slow pair of channels hardly turns: by it every query likes the landmark at 24 best.
    slow, lm = [3, 7], torch.arange(4, 29, 5)
    q[..., slow] = 5.0
    k[:, :, lm[:, None], slow] = 0.0
    k[:, :, 24, slow] = 5.0
    out = []
    for remap in (True, False):
        cache = LandmarkCache(4, 1, remap=remap)
        out.append(run(cache, q, k, v, range(1, 29)))
        assert (cache.blocks, cache.last_choice.item()) == (5, 4)
    torch.testing.assert_close(out[0][:, :, 25:], out[1][:, :, 25:])
    # Before the last block was closed, queries read old ones, which stand elsewhere.
    assert (out[0][:, :, 20:24] - out[1][:, :, 20:24]).abs().amax() > 1e-3


def test_random_is_repeatable_and_differs():
    q, k, v = (rand(1, 2, 26, 6, seed=s) for s in range(3))

    def once(seed):
        generator = torch.Generator().manual_seed(seed)
        return run(LandmarkCache(4, 1, "random", generator=generator), q, k, v, CUTS["segments"])

    first = once(0)
    assert torch.equal(first, once(0)) and not torch.equal(first, once(1))


def test_dtypes_and_an_empty_batch():
    q, k, v = (rand(1, 2, 26, 8, seed=s) for s in range(3))
    want = run(LandmarkCache(4, 5), q, k, v, CUTS["segments"])
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        out = run(LandmarkCache(4, 5), *(x.to(dtype) for x in (q, k, v)), CUTS["segments"])
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    none = run(LandmarkCache(4, 2), q[:0], k[:0], v[:0], CUTS["segments"])
    assert none.shape == (0, 2, 26, 8)


def test_a_token_reads_topk_blocks_however_long_the_past_is():
    read = []
    for n in (40, 200):
        cache = LandmarkCache(4, 2)
        q, k, v = (rand(1, 1, n, 4, seed=s) for s in range(3))
        run(cache, q, k, v, (n - 1,))
        assert cache.last_choice.shape == (1, 1, 1, 2)
        read.append(len(set(cache.last_choice.flatten().tolist())))
    assert read == [2, 2]


def test_layer_with_a_cache_is_the_layer_without():
    torch.manual_seed(0)
    layer = LandmarkAttention(8, 4, kv_heads=2).double()
    x = rand(2, 23, 8)
    whole = layer(x, marked(23, 3))
    for cuts in ((5, 9), range(1, 23)):
        cache, parts, start = layer.new_cache(3, 5), [], 0
        for end in (*cuts, 23):
            here = marked(end - start, 3, start)
            parts.append(layer(x[:, start:end], here, cache=cache))
            start = end
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LandmarkCache(0, 1), "block must be an integer >= 1"),
        (lambda: LandmarkCache(4, -1), "topk must be an integer >= 0"),
        (lambda: LandmarkCache(4, 1, "best"), "mode must be one of"),
        (
            lambda: LandmarkCache(4, 1).attend(*rand(3, 1, 1, 6, 4), marked(6, 3)),
            "must mark each token 4 of 5",
        ),
        (
            lambda: LandmarkCache(4, 1).attend(*rand(3, 1, 1, 6, 4), marked(5, 4)),
            "must mark each token 4 of 5",
        ),
        (
            lambda: LandmarkAttention(8, 2)(
                rand(1, 3, 8).float(), marked(3, 4), cache=LandmarkCache(4, 1, base=None)
            ),
            "its base must be 10000.0",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
