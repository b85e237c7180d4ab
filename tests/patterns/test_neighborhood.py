"""Neighbourhood attention against the rule written out in loops, dense attention and NATTEN."""

from __future__ import annotations

import itertools
from importlib import import_module

import pytest
import torch
from tests.core.dense import dense_attention

from regard import Causal, attend
from regard.core.attend import plan
from regard.patterns.neighborhood import (
    Neighborhood,
    NeighborhoodAttention,
    NeighborhoodBias,
    neighborhood_attention,
)


def axis_keys(length, i, w, s, d, causal):
    """The paper's rule for one position of one axis, in Python integers."""
    g, p = i % d, i // d
    inside = [x for x in range(length) if x % d == g]
    if causal:
        lead = min((p // s) * s + s - 1, len(inside) - 1)
        places = range(max(lead - w + 1, 0), p + 1)
    else:
        lead = min((p // s) * s + s // 2, len(inside) - 1)
        lo = min(max(lead - w // 2, 0), len(inside) - w)
        places = range(lo, lo + w)
    return {inside[t] for t in places}


def by_hand(grid, window, stride, dilation, causal):
    """The dense mask, point by point."""
    points = list(itertools.product(*(range(x) for x in grid)))
    out = torch.zeros(len(points), len(points), dtype=torch.bool)
    for i, q in enumerate(points):
        keys = [
            axis_keys(*rule) for rule in zip(grid, q, window, stride, dilation, causal, strict=True)
        ]
        for j, k in enumerate(points):
            out[i, j] = all(x in allowed for x, allowed in zip(k, keys, strict=True))
    return out


CONFIGS = [
    ((13,), (5,), (1,), (1,), (False,)),
    ((22,), (6,), (6,), (1,), (False,)),
    ((21,), (6,), (3,), (2,), (True,)),
    ((17,), (4,), (2,), (3,), (False,)),
    ((9, 10), (4, 5), (2, 3), (2, 1), (False, False)),
    ((7, 11), (3, 3), (1, 1), (2, 3), (True, False)),
    ((8, 8), (4, 4), (4, 4), (1, 1), (False, False)),
    ((10, 9), (5, 2), (1, 2), (2, 4), (False, True)),
    ((4, 6, 6), (3, 4, 2), (2, 4, 1), (1, 1, 3), (True, False, False)),
    ((5, 4, 7), (2, 4, 3), (1, 1, 2), (2, 1, 2), (False, False, True)),
]


def qkv(grid, heads=2, kv_heads=None, width=4, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(len(grid))
    kv_heads = heads if kv_heads is None else kv_heads
    return [
        torch.randn(batch, *grid, h, d, generator=g, dtype=torch.float64).to(dtype)
        for h, d in ((heads, width), (kv_heads, width), (kv_heads, width + 1))
    ]


def dense(q, k, v, allowed, **options):
    """Dense float64 attention on heads-last grids."""
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    out, lse = dense_attention(*flat, allowed, **options)
    grid = q.shape[1:-2]
    return out.transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_mask_is_the_rule(config):
    want, mask = by_hand(*config), Neighborhood(*config)
    assert torch.equal(mask.dense(mask.points), want)
    for block in (8, (16, 4), (7, 5)):
        assert torch.equal(mask.layout(mask.points, block=block).dense()[0, 0], want)
    plain = (mask & Causal()).layout(mask.points, block=6)
    assert torch.equal(plain.dense()[0, 0], want & Causal().dense(mask.points))
    if not any(config[4]):
        assert want.sum(1).eq(mask.keys).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_attention_and_gradients_are_dense_attention(config):
    grid, window, *rest = config
    inputs = [x.requires_grad_() for x in qkv(grid, 4, 2)]
    extra = [torch.randn(2, 3, 2, d, dtype=torch.float64, requires_grad=True) for d in (4, 5)]
    options = dict(zip(("stride", "dilation", "causal"), rest, strict=True))
    got = neighborhood_attention(
        *inputs,
        window,
        **options,
        extra_k=extra[0],
        extra_v=extra[1],
        return_lse=True,
        block=(8, 4),
    )
    flat = [x.flatten(1, -3).transpose(1, 2) for x in inputs]
    k, v = (
        torch.cat([x, more.transpose(1, 2)], 2) for x, more in zip(flat[1:], extra, strict=True)
    )
    allowed = by_hand(*config)
    allowed = torch.cat([allowed, torch.ones(len(allowed), 3, dtype=torch.bool)], 1)
    want = [x.transpose(1, 2).unflatten(1, grid) for x in dense_attention(flat[0], k, v, allowed)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    g = [torch.randn_like(x) for x in want]
    both = [
        torch.autograd.grad((o * g[0]).sum() + (e * g[1]).sum(), inputs + extra)
        for o, e in (got, want)
    ]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_without_blocks_and_lse_the_same():
    for config in CONFIGS:
        grid, window, stride, dilation, causal = config
        q, k, v = qkv(grid)
        out = neighborhood_attention(
            q, k, v, window, stride=stride, dilation=dilation, causal=causal, scale=0.3
        )
        torch.testing.assert_close(out, dense(q, k, v, by_hand(*config), scale=0.3)[0])


@pytest.mark.parametrize(
    ("config", "least"),
    [
        # The shares of the pairs that blocks of 64 tokens list: 0.50, 0.45, 1.00, 0.56.
        (((96, 96), 24), 0.7),
        (((16, 24, 24), (8, 12, 12)), 0.65),
        (((96, 96), (48, 24), (16, 8)), 1.0),
        (((96, 96), 24, 1, 2), 0.75),
    ],
    ids=str,
)
def test_most_pairs_that_are_computed_are_allowed(config, least):
    mask = Neighborhood(*config)
    q = torch.empty(1, 8, mask.points, 64)
    work = plan(q, q, q, mask=mask).density
    assert least <= mask.density(mask.points) / work <= 1.0


@pytest.mark.parametrize(
    "config",
    [
        ((37, 41), (9, 12), (1, 5), (1, 1), (False, False)),
        ((41, 37), (8, 5), (3, 1), (2, 3), (False, True)),
        ((9, 14, 11), (5, 4, 6), (1, 2, 1), (1, 3, 1), (True, False, False)),
    ],
    ids=str,
)
def test_larger_grids_and_their_gradients_in_float32(config):
    inputs = [x.requires_grad_() for x in qkv(config[0], 4, 2, dtype=torch.float32)]
    rules = dict(zip(("stride", "dilation", "causal"), config[2:], strict=True))
    got = neighborhood_attention(*inputs, config[1], **rules)
    allowed = torch.ones(1, 1)
    for length, *rule in zip(*config, strict=True):
        keys = [axis_keys(length, i, *rule) for i in range(length)]
        own = torch.tensor([[float(j in seen) for j in range(length)] for seen in keys])
        allowed = torch.kron(allowed, own)
    want = dense(*(x.double() for x in inputs), allowed.bool())[0].float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(got)
    both = [torch.autograd.grad(x, inputs, g) for x in (got, want)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_limits():
    q, k, v = qkv((6, 5))
    everything = torch.ones(30, 30, dtype=torch.bool)
    want = dense(q, k, v, everything)[0]
    for stride in (1, 2, 5):
        torch.testing.assert_close(neighborhood_attention(q, k, v, (6, 5), stride=stride), want)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 1), v)
    assert torch.equal(Neighborhood((12,), 12, causal=True).dense(12), Causal().dense(12))
    blocks = torch.block_diag(*torch.ones(3, 4, 4)).bool()
    assert torch.equal(Neighborhood((12,), 4, 4).dense(12), blocks)
    assert torch.equal(Neighborhood((12,), 4, 4, causal=True).dense(12), blocks.tril())
    # A last group that is cut off keeps a whole window: the last w tokens.
    assert Neighborhood((22,), 6, 6).dense(22)[20].nonzero().flatten().tolist() == [*range(16, 22)]
    # Away from borders the pattern repeats with the stride.
    mask = Neighborhood((40,), 8, 3).dense(40)
    assert torch.equal(mask[12:15, 4:24], mask[15:18, 7:27])
    # Decoding: the last rows of a causal axis.
    assert torch.equal(
        Neighborhood((12,), 4, causal=True).dense(2, 12),
        Neighborhood((12,), 4, causal=True).dense(12)[10:],
    )


@pytest.mark.parametrize("dilation", [(2, 3), (2, 1), (4, 2), (3, 2)])
def test_dilation_is_attention_within_residue_classes(dilation):
    q, k, v = qkv((8, 6), dtype=torch.float32)
    out = neighborhood_attention(q, k, v, 2, dilation=dilation)
    for g in itertools.product(*(range(d) for d in dilation)):
        at = (slice(None), *(slice(a, None, d) for a, d in zip(g, dilation, strict=True)))
        alone = neighborhood_attention(q[at], k[at], v[at], 2)
        torch.testing.assert_close(out[at], alone)


@pytest.mark.parametrize("dilation", [1, 2, (3, 2)])
def test_relative_bias_and_its_gradient(dilation):
    grid, window = (9, 8), (3, 3)
    q, k, v = qkv(grid, 2)
    table = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    pair = (dilation, dilation) if isinstance(dilation, int) else dilation
    points = list(itertools.product(range(9), range(8)))
    at = torch.zeros(72, 72, 2, dtype=torch.int64)
    for i, x in enumerate(points):
        for j, y in enumerate(points):
            for axis in range(2):
                at[i, j, axis] = (y[axis] // pair[axis] - x[axis] // pair[axis] + 2) % 5
    bias = table[:, at[..., 0], at[..., 1]]
    allowed = by_hand(grid, window, (1, 1), pair, (False, False))
    want = dense(q, k, v, allowed, bias=bias)[0]
    gradient = torch.autograd.grad(want.square().sum(), table)[0]
    for block in (None, 8, 64):
        got = neighborhood_attention(q, k, v, window, dilation=dilation, rpb=table, block=block)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), table)[0], gradient)
    got = neighborhood_attention(q, k, v, window, dilation=dilation, rpb=table, backend="reference")
    torch.testing.assert_close(got, want)


def test_bias_in_any_shape_of_indices():
    mask = Neighborhood((5, 4), 3)
    bias = NeighborhoodBias(torch.randn(2, 5, 5).double().requires_grad_(), mask)
    i, j = torch.tensor([3, 7, 12]), torch.tensor([2, 11, 12])
    plane = bias.scores(i[:, None], j[None], torch.arange(2)[:, None, None])
    flat = torch.stack([bias.scores(i, j, h) for h in range(2)])
    torch.testing.assert_close(flat, plane.diagonal(dim1=1, dim2=2))
    buffers = [torch.zeros(2, 5, 5).double() for _ in range(2)]
    for h in range(2):
        bias.accumulate((buffers[0],), torch.ones(3).double(), i, j, h)
    grad = torch.eye(3).double().expand(2, 3, 3)
    bias.accumulate((buffers[1],), grad, i[:, None], j[None], torch.arange(2)[:, None, None])
    torch.testing.assert_close(*buffers)
    assert buffers[0].sum() == 6


def test_module_is_its_parts():
    torch.manual_seed(0)
    module = NeighborhoodAttention(12, 3, (3, 2), stride=(2, 1), dilation=2).double()
    assert [*module.state_dict()] == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    x = torch.randn(2, 7, 5, 12, dtype=torch.float64)
    rows = (x @ module.qkv.weight.T + module.qkv.bias).view(2, 35, 3, 3, 4).permute(2, 0, 3, 1, 4)
    allowed = by_hand((7, 5), (3, 2), (2, 1), (2, 2), (False, False))
    out = dense_attention(*rows, allowed)[0].transpose(1, 2).reshape(2, 7, 5, 12)
    torch.testing.assert_close(module(x), out @ module.proj.weight.T + module.proj.bias)
    line = NeighborhoodAttention(12, 3, 3, qkv_bias=False, attn_drop=0.5)
    assert line.qkv.bias is None and "window=3" in repr(line)
    volume = torch.randn(1, 3, 4, 3, 12)
    assert line(volume).shape == volume.shape
    assert torch.equal(line.eval()(volume), line.eval()(volume))
    assert not torch.equal(line(volume), line.train()(volume))


@pytest.mark.parametrize(
    "config",
    [
        ((16,), (5,), (1,), (3,), (True,)),
        ((10, 13), (4, 5), (3, 1), (2, 2), (False, True)),
        ((5, 6, 7), (3, 4, 3), (1, 2, 3), (1, 1, 2), (False, False, True)),
    ],
    ids=str,
)
def test_natten_agrees(config):
    natten = import_module("natten.functional")
    grid, window, stride, dilation, causal = config
    q, k, v = (
        torch.randn(1, *grid, 2, 32, generator=torch.Generator().manual_seed(x)) for x in range(3)
    )
    want, want_lse = getattr(natten, f"na{len(grid)}d")(
        q,
        k,
        v,
        kernel_size=window,
        stride=stride,
        dilation=dilation,
        is_causal=causal,
        backend="flex-fna",
        return_lse=True,
    )
    out, lse = neighborhood_attention(
        q, k, v, window, stride=stride, dilation=dilation, causal=causal, return_lse=True
    )
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    q, k, v = qkv((6, 5))
    for call, words in (
        (lambda: Neighborhood((6, 5), 7), "larger than the 6 positions of axis 0"),
        (lambda: Neighborhood((6, 5), 3, dilation=2), "larger than the 5 positions of axis 1"),
        (lambda: Neighborhood((6,), 3, 4), "stride <= window"),
        (lambda: Neighborhood((6,), 0), "stride <= window"),
        (lambda: Neighborhood((2, 2, 2, 2), 1), "one to three extents"),
        (lambda: Neighborhood((6, 5), (3, 3, 3)), "window must be int or a tuple of 2"),
        (lambda: Neighborhood((6,), 3, causal=1), "causal must be bool"),
        (lambda: neighborhood_attention(q, k[:, :5], v, 3), "k has shape"),
        (lambda: neighborhood_attention(q, k, v, 3, extra_k=k[:, 0]), "come together"),
        (lambda: neighborhood_attention(q, k, v, 3, rpb=torch.ones(2, 3, 3)), "table has shape"),
        (lambda: neighborhood_attention(q, k, v, 2, rpb=torch.ones(2, 3, 3)), "odd windows"),
        (lambda: NeighborhoodAttention(8, 3, 3), "3 heads do not divide dim 8"),
        (lambda: NeighborhoodAttention(8, 2, 3)(torch.ones(1, 5, 7)), "x has shape"),
        (lambda: attend(*torch.randn(3, 1, 1, 9, 4), mask=Neighborhood((8,), 3)), "grid of 8"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
