"""Landmark Attention against its formula written out, its limiting cases, and explicit key moves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.sparse import landmark as module
from regard.sparse.landmark import landmark_attention
from regard.sparse.landmark_layer import LandmarkAttention
from regard.sparse.landmark_tokens import insert_landmarks, landmark_positions, landmark_targets


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def marks(batch, m, share=0.25, seed=0):
    return torch.rand(batch, m, generator=torch.Generator().manual_seed(seed)) < share


def weights(logits, is_landmark):
    """The weights `(N, M)` of one head, row by row as the paper writes them."""
    n, m = logits.shape
    block = (is_landmark.long().cumsum(0) - is_landmark.long()).tolist()
    out = torch.zeros_like(logits)
    for row in range(n):
        i = row + m - n
        own = [j for j in range(i + 1) if block[j] == block[i] and not is_landmark[j]]
        lm = [j for j in range(i) if is_landmark[j] and block[j] < block[i]]
        if not own + lm:
            continue
        first = dict(zip(own + lm, logits[row, own + lm].softmax(0), strict=True))
        for j in own:
            out[row, j] = first[j]
        for c in lm:
            inside = [j for j in range(c) if block[j] == block[c]]
            if inside:
                out[row, inside] = first[c] * logits[row, inside].softmax(0)
    return out


def definition(q, k, v, is_landmark, scale=None):
    b, h, _, d = q.shape
    scale = d**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(h // k.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * scale
    is_landmark = is_landmark.expand(b, k.shape[2])
    rows = [[weights(logits[x, y], is_landmark[x]) for y in range(h)] for x in range(b)]
    return torch.stack([torch.stack(r) for r in rows]) @ v


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (29, 29), (5, 33), (1, 20)])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_is_the_grouped_softmax(n, m, heads):
    h, hkv = heads
    q, k, v = rand(2, h, n, 4), rand(2, hkv, m, 4, seed=1), rand(2, hkv, m, 3, seed=2)
    for seed, share in enumerate((0.1, 0.3, 0.8)):
        is_landmark = marks(2, m, share, seed)
        torch.testing.assert_close(
            landmark_attention(q, k, v, is_landmark), definition(q, k, v, is_landmark)
        )
    out = landmark_attention(q, k, v, is_landmark[0], scale=2.0)
    torch.testing.assert_close(out, definition(q, k, v, is_landmark[0], scale=2.0))


@pytest.mark.parametrize("keys", [1, 40])
def test_groups_of_blocks_do_not_matter(keys, monkeypatch):
    monkeypatch.setattr(module, "_KEYS", keys)
    q, k, v = (rand(2, 1, 40, 4, seed=s) for s in range(3))
    for share in (0.15, 0.5):
        is_landmark = marks(2, 40, share)
        torch.testing.assert_close(
            landmark_attention(q, k, v, is_landmark), definition(q, k, v, is_landmark)
        )


def test_low_precision_and_the_log_sum_exp():
    q, k, v = (rand(1, 2, 41, 8, seed=s) for s in range(3))
    is_landmark = torch.arange(41) % 6 == 5
    want, lse = landmark_attention(q, k, v, is_landmark, return_lse=True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        low = [x.to(dtype) for x in (q, k, v)]
        out, level = landmark_attention(*low, is_landmark, return_lse=True)
        assert out.dtype == dtype and level.dtype == torch.float32
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(level.double(), lse, rtol=tolerance, atol=tolerance)
    # Row 20: block 3 holds 18, 19, 20; landmarks at 5, 11, 17.
    logits = (q[0, 1, 20] @ k[0, 1, [18, 19, 20, 5, 11, 17]].T) * 8**-0.5
    torch.testing.assert_close(lse[0, 1, 20], logits.logsumexp(0))


def test_without_landmarks_it_is_causal_attention():
    q, k, v = rand(2, 4, 9, 8), rand(2, 2, 30, 8, seed=1), rand(2, 2, 30, 8, seed=2)
    kk, vv = (x.repeat_interleave(2, 1) for x in (k, v))
    seen = torch.ones(9, 30, dtype=torch.bool).tril(21)
    want = F.scaled_dot_product_attention(q, kk, vv, attn_mask=seen)
    none = torch.zeros(30, dtype=torch.bool)
    torch.testing.assert_close(landmark_attention(q, k, v, none), want)


def test_blocks_of_one_token_are_landmark_keys_with_the_tokens_values():
    q, k, v = (rand(1, 2, 20, 4, seed=s) for s in range(3))
    is_landmark = torch.arange(20) % 2 == 1
    # Row i sees its own token and, for every earlier pair, key 2c + 1 with value 2c.
    i, j = torch.arange(20)[:, None], torch.arange(20)[None]
    seen = ((j % 2 == 1) & (j // 2 < i // 2)) | ((j % 2 == 0) & (j // 2 == i // 2))
    values = torch.where(is_landmark[:, None], v.roll(1, 2), v)
    want = F.scaled_dot_product_attention(q, k, values, attn_mask=seen)
    torch.testing.assert_close(landmark_attention(q, k, v, is_landmark), want)


def test_empty_rows_and_empty_blocks():
    q, k, v = (rand(1, 1, 6, 4, seed=s) for s in range(3))
    is_landmark = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    out, lse = landmark_attention(q, k, v, is_landmark, return_lse=True)
    assert not out[0, 0, 0].any() and lse[0, 0, 0] == -torch.inf
    # The second landmark sees the first, whose block holds nothing: a weight without a value.
    assert not out[0, 0, 1].any() and torch.isfinite(lse[0, 0, 1])
    torch.testing.assert_close(out, definition(q, k, v, is_landmark))
    everything = torch.ones(6, dtype=torch.bool)
    assert not landmark_attention(q, k, v, everything).any()
    none = torch.zeros(0, 6, dtype=torch.bool)
    assert landmark_attention(q[:0], k[:0], v[:0], none).shape == (0, 1, 6, 4)


def test_decoding_is_the_last_row_of_the_prompt():
    q, k, v = (rand(2, 2, 33, 4, seed=s) for s in range(3))
    is_landmark = marks(2, 33)
    whole = landmark_attention(q, k, v, is_landmark)
    for m in (1, 12, 33):
        last = landmark_attention(q[:, :, m - 1 : m], k[:, :, :m], v[:, :, :m], is_landmark[:, :m])
        torch.testing.assert_close(last, whole[:, :, m - 1 : m])


def test_gradients_and_causality():
    q, k, v = (rand(1, 1, 6, 2, seed=s).requires_grad_() for s in range(3))
    is_landmark = torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, is_landmark), (q, k, v))
    q, k, v = (rand(2, 2, 50, 8, seed=s, dtype=torch.float32) for s in range(3))
    is_landmark = marks(2, 50)
    before = landmark_attention(q, k, v, is_landmark)
    for at in (1, 20, 49):
        moved = [x.clone() for x in (q, k, v)]
        for x in moved:
            x[:, :, at:] += 100.0
        assert torch.equal(landmark_attention(*moved, is_landmark)[:, :, :at], before[:, :, :at])


def test_inserting_landmarks_and_targets():
    ids = torch.arange(7).expand(2, 7)
    put = insert_landmarks(ids, 3, 99)
    assert put[1].tolist() == [0, 1, 2, 99, 3, 4, 5, 99, 6]
    assert landmark_targets(put, 99)[0].tolist() == [1, 2, 3, -100, 4, 5, 6, -100, -100]
    twice = torch.tensor([99, 1, 99, 99, 2])
    assert landmark_targets(twice, 99, ignore=-1).tolist() == [-1, 2, -1, -1, -1]
    assert insert_landmarks(ids[:, :2], 3, 99).tolist() == ids[:, :2].tolist()
    assert insert_landmarks(ids, 1, 99)[0, :4].tolist() == [0, 99, 1, 99]
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert insert_landmarks(empty, 3, 99).shape == landmark_targets(empty, 99).shape == (2, 0)


def test_positions_jump_behind_landmarks_only():
    is_landmark = (torch.arange(50) % 5 == 4).expand(3, 50)
    assert torch.equal(landmark_positions(is_landmark)[2], torch.arange(50))
    generator = torch.Generator().manual_seed(0)
    jumped = landmark_positions(is_landmark, 100, generator)
    steps = jumped.diff(dim=-1)
    assert (steps[:, ~is_landmark[0, :-1]] == 1).all()
    behind = steps[:, is_landmark[0, :-1]]
    assert behind.min() >= 1 and 50 < behind.max() <= 100
    assert not torch.equal(jumped[0], jumped[1])
    again = landmark_positions(is_landmark, 100, torch.Generator().manual_seed(0))
    assert torch.equal(jumped, again)


@pytest.mark.parametrize("base", [None, 100.0])
def test_layer_is_its_parts(base):
    torch.manual_seed(0)
    layer = LandmarkAttention(8, 4, kv_heads=2, head_dim=6, base=base).double()
    x, is_landmark = rand(2, 13, 8), marks(2, 13)
    q, k, v = layer.qkv(x).split([24, 12, 12], -1)
    q, k, v = (t.unflatten(-1, (-1, 6)).transpose(1, 2) for t in (q, k, v))
    at = landmark_positions(is_landmark, 9, torch.Generator().manual_seed(1))
    if base is not None:
        # Complex form of the rotation: channels i and i + D / 2 are one number.
        def turn(t):
            angle = at[:, None, :, None] * base ** -(torch.arange(0, 6, 2).double() / 6)
            z = torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
            return torch.cat([z.real, z.imag], -1)

        q, k = turn(q), turn(k)
    want = layer.out(definition(q, k, v, is_landmark).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, is_landmark, at), want)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: landmark_attention(*rand(3, 1, 1, 4, 4), torch.ones(4)), "expected bool"),
        (
            lambda: landmark_attention(*rand(3, 1, 1, 4, 4), torch.ones(3, dtype=torch.bool)),
            r"expected bool \(4,\)",
        ),
        (
            lambda: landmark_attention(
                rand(1, 1, 5, 4), *rand(2, 1, 1, 4, 4), torch.ones(4, dtype=torch.bool)
            ),
            "5 queries and 4 keys",
        ),
        (lambda: insert_landmarks(torch.arange(4), 0, 9), "every must be an integer >= 1"),
        (lambda: landmark_positions(torch.ones(4), 2), r"expected a bool \(B, N\)"),
        (lambda: LandmarkAttention(8, 3), "3 heads do not divide dim 8"),
        (lambda: LandmarkAttention(8, 4, kv_heads=3), "3 key heads do not divide 4"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
