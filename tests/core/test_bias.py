"""Biases against the papers' formulas written out with loops or plain torch."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from regard.core.bias import (
    ALiBi,
    Bias,
    DenseBias,
    LowRankBias,
    RelativeBias1D,
    RelativeBias2D,
    as_bias,
)

B, H, N, M = 2, 4, 5, 12


def rand(*shape, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


def biases(grad=False):
    return {
        "dense2": DenseBias(rand(N, M, grad=grad)),
        "dense3": DenseBias(rand(H, M, M, grad=grad)),
        "dense4": DenseBias(rand(B, H, N, M, grad=grad)),
        "dense4_shared": DenseBias(rand(B, 1, N, M, grad=grad)),
        "alibi": ALiBi(rand(H, grad=grad)),
        "rel1d": RelativeBias1D(rand(H, 7, grad=grad)),
        "rel2d": RelativeBias2D(rand(H, 5, 7, grad=grad), (3, 4)),
        "lowrank": LowRankBias(rand(H, N, 3, grad=grad), rand(B, 1, M, 3, seed=1, grad=grad)),
        "lowrank2": LowRankBias(rand(N, 3, grad=grad), rand(M, 3, seed=1, grad=grad)),
    }


def written_out(name, t, b, h, i, j):
    """The definition, for one batch entry, head and pair of positions."""
    row = i - (M - N)
    if name == "dense2":
        return t[0][row, j]
    if name == "dense3":
        return t[0][h, i, j]
    if name == "dense4":
        return t[0][b, h, row, j]
    if name == "dense4_shared":
        return t[0][b, 0, row, j]
    if name == "alibi":
        return t[0][h] * (j - i)
    if name == "rel1d":
        return t[0][h, max(-3, min(3, j - i)) + 3]
    if name == "rel2d":
        return t[0][h, i // 4 - j // 4 + 2, i % 4 - j % 4 + 3]
    if name == "lowrank":
        return (t[0][h, row] * t[1][b, 0, j]).sum()
    return (t[0][row] * t[1][j]).sum()


def table(name, bias):
    t = bias.tensors()
    out = torch.empty(B, H, N, M, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for r in range(N):
                for j in range(M):
                    out[b, h, r, j] = written_out(name, t, b, h, r + M - N, j).detach()
    return out


def full_index():
    i = torch.arange(M - N, M).view(-1, 1)
    j = torch.arange(M).view(1, -1)
    return i, j, torch.arange(H).view(1, H, 1, 1), torch.arange(B).view(B, 1, 1, 1)


@pytest.mark.parametrize("name", list(biases()))
def test_scores_equal_the_definition(name):
    bias, want = biases()[name], table(name, biases()[name])
    i, j, h, b = full_index()
    bias.check(N, M, heads=H, batch=B)
    torch.testing.assert_close(bias.scores(i, j, h, b).expand(B, H, N, M), want)
    # One head and batch entry by number, a stretch of keys, and scattered positions.
    torch.testing.assert_close(bias.scores(i, j[:, 3:7], 2, 1), want[1, 2, :, 3:7])
    jj = torch.tensor([[7, 0, 3]])
    torch.testing.assert_close(bias.scores(i, jj, 2, 1), want[1, 2][:, [7, 0, 3]])
    # Pairs one by one.
    at, keys = torch.tensor([M - 1, M - N, M - 2]), torch.tensor([0, 5, 4])
    torch.testing.assert_close(bias.scores(at, keys, 3, 1), want[1, 3, at - (M - N), keys])
    # A list of gathered blocks, each with its own head.
    rows = torch.tensor([[0, 4], [2, 3], [1, 1]]) + M - N
    cols = torch.tensor([[5, 6, 7], [0, 1, 2], [9, 3, 4]])
    heads = torch.tensor([3, 0, 1])
    got = bias.scores(rows[:, :, None], cols[:, None, :], heads[:, None, None], 1)
    for p in range(3):
        expect = want[1, heads[p]][rows[p] - (M - N)][:, cols[p]]
        torch.testing.assert_close(got[p], expect)


@pytest.mark.parametrize("name", list(biases()))
def test_padding_of_a_block_may_lie_outside(name):
    bias, want = biases()[name], table(name, biases()[name])
    i = torch.tensor([M - 1, 0, M + 3]).view(-1, 1)
    j = torch.tensor([[2, M + 5, -1]])
    assert bias.scores(i, j, 1, 0)[0, 0] == want[0, 1, -1, 2]


@pytest.mark.parametrize("name", list(biases()))
def test_accumulate_is_the_gradient(name):
    bias = biases(grad=True)[name]
    i, j, h, b = full_index()
    cases = [
        (i, j, h, b),
        (i[1:3], j[:, 2:8], 1, 1),
        (i, torch.tensor([[3, 3, 0]]), h, b),
        ((i[:, 0] * 0 + i[2])[:2].view(1, 2, 1), j.view(1, 1, M)[..., :5], h[0], 0),
    ]
    for at in cases:
        shape = torch.broadcast_shapes(*(torch.as_tensor(x).shape for x in at))
        weight = rand(*shape, seed=9)
        buffers = tuple(torch.zeros_like(t) for t in bias.tensors())
        bias.accumulate(buffers, weight, *at)
        # Through scattered indexing alone: the pairs one by one.
        bi, hi, ii, jj = torch.broadcast_tensors(
            torch.as_tensor(at[3]), torch.as_tensor(at[2]), at[0], at[1]
        )
        pairs = zip(
            bi.flatten().tolist(),
            hi.flatten().tolist(),
            ii.flatten().tolist(),
            jj.flatten().tolist(),
            strict=True,
        )
        total = sum(
            w * written_out(name, bias.tensors(), *pair)
            for w, pair in zip(weight.flatten(), pairs, strict=True)
        )
        want = torch.autograd.grad(total, bias.tensors())
        for got, expect in zip(buffers, want, strict=True):
            torch.testing.assert_close(got, expect)


def test_accumulate_leaves_unwanted_tensors_alone():
    bias = LowRankBias(rand(N, 2, grad=True), rand(M, 2))
    i, j, _, _ = full_index()
    buffer = torch.zeros(N, 2, dtype=torch.float64)
    bias.accumulate((buffer, None), torch.ones(N, M), i, j)
    want = bias.phi_k.sum(0).expand(N, 2)
    torch.testing.assert_close(buffer, want)
    DenseBias(rand(N, M)).accumulate((None,), torch.ones(N, M), i, j)
    frozen = RelativeBias1D(rand(H, 3))
    still = torch.zeros(H, 3, dtype=torch.float64)
    frozen.accumulate((still,), torch.ones(N, M), i, j)
    assert not still.any()


@pytest.mark.parametrize("name", ["alibi", "lowrank", "lowrank2"])
def test_factors_multiply_to_the_bias(name):
    bias = biases()[name]
    phi_q, phi_k = bias.factors(N, M)
    assert phi_q.dim() == 4 and phi_k.dim() == 4
    got = (phi_q @ phi_k.transpose(-1, -2)).expand(B, H, N, M)
    torch.testing.assert_close(got, table(name, bias))


def test_factors_give_the_attention_of_the_dense_bias():
    q, k, v = rand(B, H, N, 8, seed=1), rand(B, H, M, 8, seed=2), rand(B, H, M, 8, seed=3)
    bias = biases()["alibi"]
    phi_q, phi_k = (x.expand(B, H, -1, -1) for x in bias.factors(N, M))
    wide_q, wide_k = torch.cat([q * 8**-0.5, phi_q], -1), torch.cat([k, phi_k], -1)
    got = F.scaled_dot_product_attention(wide_q, wide_k, v, scale=1.0)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=table("alibi", bias))
    torch.testing.assert_close(got, want)


def test_alibi_slopes_are_the_papers():
    # Section 3 of the paper: 8 heads have 1/2, 1/4, ..., 1/256; 16 start at 2^-0.5.
    torch.testing.assert_close(
        ALiBi.for_heads(8).slopes, torch.tensor([2.0 ** -(h + 1) for h in range(8)])
    )
    torch.testing.assert_close(ALiBi.for_heads(16).slopes[0], torch.tensor(2**-0.5))
    # transformers' ALiBi tensor for 6 heads (BLOOM): not a power of two.
    bloom = import_module("transformers.models.bloom.modeling_bloom")
    for heads in (1, 6, 12, 20):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(ALiBi.for_heads(heads).slopes, theirs)
    with pytest.raises(ValueError, match="ALiBi: heads must be >= 1"):
        ALiBi.for_heads(0)


def test_half_precision_keeps_positions_with_a_common_origin():
    # Float16 holds integers to 2048 exactly: 4096 positions from the middle all fit.
    phi_q, phi_k = ALiBi.for_heads(8).factors(4, 4096)
    got = phi_q.half().float() @ phi_k.half().float().transpose(-1, -2)
    want = phi_q.double() @ phi_k.double().transpose(-1, -2)
    assert (got - want).abs().max() == 0


def test_as_bias():
    bias = biases()["alibi"]
    assert as_bias(bias) is bias
    dense = as_bias(torch.zeros(3, 3))
    assert isinstance(dense, DenseBias) and dense.heads is None and dense.batch is None
    with pytest.raises(ValueError, match=r"bool tensor, expected a float one.*Dense\(tensor\)"):
        as_bias(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"tensor of torch\.int64"):
        as_bias(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected a Bias or a float tensor, got list"):
        as_bias([1.0])
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        as_bias(torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ALiBi(torch.zeros(2, 2)), "ALiBi: slopes has shape"),
        (lambda: RelativeBias1D(torch.zeros(2, 4)), "RelativeBias1D: table has shape"),
        (lambda: RelativeBias2D(torch.zeros(2, 4, 5), (2, 3)), "RelativeBias2D: table has shape"),
        (lambda: LowRankBias(torch.zeros(4), torch.zeros(4, 1)), "LowRankBias: phi_q has shape"),
        (lambda: LowRankBias(torch.zeros(4, 2), torch.zeros(4, 1)), "phi_q has rank 2"),
        (lambda: LowRankBias(torch.zeros(3, 4, 2), torch.zeros(2, 4, 2)), "phi_q has 3 heads"),
        (lambda: DenseBias(torch.zeros(3, 5)).check(4, 5), "got 3 rows and 5 columns"),
        (lambda: DenseBias(torch.zeros(2, 3, 5)).check(3, 5, heads=4), "made for heads=2"),
        (lambda: DenseBias(torch.zeros(2, 3, 3, 5)).check(3, 5, 3, 4), "made for batch=2"),
        (lambda: biases()["rel2d"].check(5, 13), "grid of 12 tokens"),
        (lambda: biases()["lowrank"].check(5, 13), "made for 5 queries and 12 keys"),
    ],
)
def test_bad_input_names_itself(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bias_of_ones_own():
    class Far(Bias):
        def scores(self, i, j, h=0, b=0):
            return -(i - j).abs().float()

    far = Far()
    i, j, _, _ = full_index()
    far.check(N, M, heads=3, batch=2)
    far.accumulate((), torch.ones(N, M), i, j)
    assert far.factors(N, M) is None and far.tensors() == ()
    with pytest.raises(NotImplementedError):
        Bias().scores(i, j)
