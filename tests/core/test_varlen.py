"""Packed attention against a padded batch, in plain torch with a key mask."""

from __future__ import annotations

import math

import pytest
import torch

from regard import ALiBi, Causal, Keys, SlidingWindow
from regard.core import varlen
from regard.core.varlen import attend_packed, pack, unpack


def rand(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=dtype)


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def padded(q, k, v, lens_q, lens_k, causal=False, extra=None):
    """Each sequence on its own, densely, in float64."""
    outs, lses = [], []
    for s, (a, b) in enumerate(
        zip(cumulative(lens_q).tolist(), cumulative(lens_k).tolist(), strict=True)
    ):
        if s == len(lens_q):
            break
        n, m = lens_q[s], lens_k[s]
        qs, ks, vs = (
            x.double().transpose(0, 1) for x in (q[a : a + n], k[b : b + m], v[b : b + m])
        )
        ks, vs = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (ks, vs))
        score = qs @ ks.transpose(1, 2) * q.shape[-1] ** -0.5
        i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
        if extra is not None:
            score = score + extra(i, j)
        if causal:
            score = score.masked_fill(j > i, -math.inf)
        outs.append((torch.softmax(score, -1).nan_to_num(0.0) @ vs).transpose(0, 1))
        lses.append(torch.logsumexp(score, -1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


LENGTHS = [
    ([5, 12, 1, 9], [5, 12, 1, 9]),
    ([4, 0, 4, 7, 4], [4, 0, 4, 7, 4]),
    ([1, 1, 1], [6, 3, 6]),
    ([3, 5, 2, 3], [7, 2, 0, 7]),
    ([2], [2]),
]


@pytest.mark.parametrize(("lens_q", "lens_k"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [512, 3])
def test_equals_each_sequence_alone(lens_q, lens_k, causal, group, monkeypatch):
    monkeypatch.setattr(varlen, "_GROUP_LENGTH", group)
    q, k, v = (
        rand(sum(lens), h, d, seed=s)
        for s, (lens, h, d) in enumerate([(lens_q, 4, 8), (lens_k, 2, 8), (lens_k, 2, 6)])
    )
    got = attend_packed(
        q, k, v, cumulative(lens_q), cumulative(lens_k), causal=causal, return_lse=True
    )
    want = padded(q, k, v, lens_q, lens_k, causal)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    alone = attend_packed(q, k, v, cumulative(lens_q), cumulative(lens_k), causal=causal)
    torch.testing.assert_close(alone, want[0])


def test_equals_sdpa_on_the_padded_batch():
    lengths = torch.tensor([5, 12, 1, 9])
    q, k, v = (rand(4, 12, 2, 8, seed=s, dtype=torch.float32) for s in range(3))
    valid = torch.arange(12) < lengths[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=valid[:, None, None]
    ).transpose(1, 2)
    packed = pack(q, lengths)
    out = attend_packed(packed.x, pack(k, lengths).x, pack(v, lengths).x, packed.cu_seqlens)
    back = unpack(out, packed.rows, (4, 12))
    torch.testing.assert_close(back[valid], want[valid])
    assert not back[~valid].any()


def test_independent_of_batch_composition():
    lens = [5, 3, 5, 8]
    q, k, v = (rand(21, 2, 8, seed=s) for s in range(3))
    whole = attend_packed(q, k, v, cumulative(lens), causal=True)
    cu = cumulative(lens).tolist()
    perm = [2, 0, 3, 1]
    rows = torch.cat([torch.arange(cu[s], cu[s + 1]) for s in perm])
    moved = attend_packed(
        q[rows], k[rows], v[rows], cumulative([lens[s] for s in perm]), causal=True
    )
    torch.testing.assert_close(moved, whole[rows])


def test_gradients_equal_the_dense_ones():
    lens_q, lens_k = [3, 0, 3, 2], [4, 2, 4, 0]
    leaves = [
        rand(sum(n), 2, 4, seed=s).requires_grad_() for s, n in enumerate((lens_q, lens_k, lens_k))
    ]
    cu_q, cu_k = cumulative(lens_q), cumulative(lens_k)

    def loss(out, lse):
        return (out * rand(*out.shape, seed=7)).sum() + lse[~torch.isinf(lse)].square().sum()

    got = attend_packed(*leaves, cu_q, cu_k, causal=True, return_lse=True)
    found = torch.autograd.grad(loss(*got), leaves)
    want = torch.autograd.grad(loss(*padded(*leaves, lens_q, lens_k, causal=True)), leaves)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0))


def test_mask_and_bias_count_positions_within_the_sequence():
    lens = [5, 9, 5]
    q, k, v = (rand(19, 2, 8, seed=s) for s in range(3))
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)

    def near(i, j):
        far = torch.where((i - j > 2) | (j > i), -math.inf, 0.0).double()
        return far + slopes[:, None, None] * (j - i)

    want = padded(q, k, v, lens, lens, extra=near)[0]
    got = attend_packed(
        q, k, v, cumulative(lens), causal=True, mask=SlidingWindow(2), bias=ALiBi(slopes)
    )
    torch.testing.assert_close(got, want)


def test_no_sequence_has_queries_or_keys():
    q, k = rand(0, 2, 4), rand(3, 2, 4)
    out, lse = attend_packed(q, k, k, torch.tensor([0, 0]), torch.tensor([0, 3]), return_lse=True)
    assert out.shape == (0, 2, 4) and lse.shape == (0, 2)
    out = attend_packed(rand(3, 2, 4), k[:0], k[:0], torch.tensor([0, 3]), torch.tensor([0, 0]))
    assert out.shape == (3, 2, 4) and not out.any()


def test_pack_and_unpack():
    x = rand(3, 4, 2)
    packed = pack(x, [2, 0, 4])
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 6]
    assert torch.equal(packed.x, torch.cat([x[0, :2], x[2]]))
    back = unpack(packed.x, packed.rows, (3, 4))
    assert torch.equal(back[0, :2], x[0, :2]) and torch.equal(back[2], x[2])
    assert not back[0, 2:].any() and not back[1].any()
    # Any tokens may count, not only the first ones.
    keep = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    packed = pack(x, keep)
    assert torch.equal(packed.x, x[keep]) and packed.cu_seqlens.tolist() == [0, 2, 3, 7]
    assert torch.equal(unpack(packed.x, packed.rows, (3, 4)), x * keep[..., None])


def test_gradients_do_not_reach_the_padding():
    x = rand(2, 3, 2).requires_grad_()
    packed = pack(x, [1, 3])
    unpack(packed.x, packed.rows, (2, 3)).sum().backward()
    assert x.grad[0, 1:].abs().sum() == 0 and (x.grad[1] == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, cu: attend_packed(x[None], x, x, cu), r"q has shape \(1, 6, 2, 4\)"),
        (lambda x, cu: attend_packed(x, x, x, cu - 1), "cu_q is"),
        (lambda x, cu: attend_packed(x, x, x, cu.float()), r"cu_q is \(3,\)"),
        (lambda x, cu: attend_packed(x, x, x, cu, cu[1:] * 0), "cu_k is"),
        (lambda x, cu: attend_packed(x, x, x, cu, torch.tensor([0, 6])), "cu_k 1"),
        (lambda x, cu: attend_packed(x, x, x[:, :1], cu), "v has shape"),
        (
            lambda x, cu: attend_packed(x, x, x, cu, mask=Causal() & Keys(torch.ones(2, 6).bool())),
            "made for batch=2",
        ),
        (lambda x, cu: pack(x[0, 0], [1]), "pack: x has shape"),
        (lambda x, cu: pack(x, [1, 2]), r"lengths has shape \(2,\)"),
        (lambda x, cu: pack(x, [3, 0, 0, 0, 0, 0]), r"lengths must lie in 0\.\.2"),
        (lambda x, cu: pack(x, torch.ones(6, 3, dtype=torch.bool)), "the mask has shape"),
        (lambda x, cu: unpack(x, cu, (2, 4)), "unpack: x has 6 rows"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call(rand(6, 2, 4), torch.tensor([0, 2, 6]))
