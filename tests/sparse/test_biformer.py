"""Bi-level routing against its equations region by region, limiting cases, and the authors' rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.core.layout import BlockLayout
from regard.sparse.biformer import (
    BiLevelRoutingAttention,
    region_attend,
    region_layout,
    route_regions,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(grid, region):
    """The pixels of each region, row-major, cut off at the border."""
    (rows, columns), (height, width) = grid, region
    return [
        [
            (y, x)
            for y in range(top, min(top + height, rows))
            for x in range(left, min(left + width, columns))
        ]
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def take(x, at):
    return torch.stack([x[..., y, z, :] for y, z in at], dim=-2)


def means(x, region):
    """`(B, R, H D)`."""
    found = [take(x, at).mean(-2) for at in pixels(x.shape[2:4], region)]
    return torch.stack(found, 1).flatten(2)


def equation(q, k, v, index, region, kv_region, scale):
    """Eqs. 5 and 6: one region after the other, the chosen keys put side by side."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    out = torch.zeros(*q.shape[:4], v.shape[-1], dtype=q.dtype)
    theirs = pixels(k.shape[2:4], kv_region)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for r, at in enumerate(pixels(q.shape[2:4], region)):
                lines = index[b % len(index), head % index.shape[1], r].tolist()
                seen = [p for chosen in lines if chosen >= 0 for p in theirs[chosen]]
                if not seen:
                    continue
                scores = take(q[b, head], at) @ take(k[b, head], seen).mT * scale
                values = scores.softmax(-1) @ take(v[b, head], seen)
                for (y, x), value in zip(at, values, strict=True):
                    out[b, head, y, x] = value
    return out


@pytest.mark.parametrize(
    ("grid", "region", "kv_grid", "kv_region"),
    [
        ((4, 6), (2, 3), (4, 6), (2, 3)),
        ((8, 8), (4, 2), (8, 8), (4, 2)),
        ((7, 5), (3, 2), (7, 5), (3, 2)),
        ((1, 1), (1, 1), (1, 1), (1, 1)),
        ((5, 4), (2, 2), (3, 7), (2, 3)),
        ((4, 4), (2, 2), (8, 8), (4, 4)),
    ],
)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_is_the_equation_region_by_region(grid, region, kv_grid, kv_region, heads):
    q, k, v = rand(2, heads[0], *grid, 5), *(rand(2, heads[1], *kv_grid, d, seed=d) for d in (5, 3))
    regions, kv_regions = (len(pixels(*x)) for x in ((grid, region), (kv_grid, kv_region)))
    g = torch.Generator().manual_seed(1)
    for width in {1, min(3, kv_regions), kv_regions}:
        shared = torch.rand(2, regions, kv_regions, generator=g).argsort(-1)[..., :width]
        apart = torch.rand(2, heads[0], regions, kv_regions, generator=g).argsort(-1)[..., :width]
        for index in (shared, apart):
            got = region_attend(q, k, v, index, region, kv_region_size=kv_region, scale=0.3)
            lines = index if index.dim() == 4 else index[:, None]
            want = equation(q, k, v, lines, region, kv_region, 0.3)
            torch.testing.assert_close(got, want)


def test_a_region_without_regions_gives_zero_and_repeats_count_once():
    q, k, v = (rand(1, 2, 4, 4, 3, seed=s) for s in range(3))
    index = torch.tensor([[[-1, -1], [3, 3], [2, -1], [0, 1]]])
    out = region_attend(q, k, v, index, (2, 2))
    assert (out[:, :, :2, :2] == 0).all()
    once = torch.tensor([[[-1, -1], [3, -1], [2, -1], [1, 0]]])
    torch.testing.assert_close(out, region_attend(q, k, v, once, (2, 2)))
    torch.testing.assert_close(out, equation(q, k, v, once[:, None], (2, 2), (2, 2), 3**-0.5))


def test_the_choice_is_the_topk_of_mean_affinities():
    for grid, region in (((8, 6), (2, 3)), ((7, 5), (3, 2)), ((9, 4), (9, 4))):
        q, k = rand(2, 3, *grid, 4), rand(2, 3, *grid, 4, seed=1)
        affinity = means(q, region) @ means(k, region).mT
        for topk in range(1, affinity.shape[-1] + 1):
            got = route_regions(q, k, region, topk)
            want = affinity.topk(topk, dim=-1).indices.sort(-1).values
            assert torch.equal(got, want)


def test_equal_affinities_take_the_earlier_region():
    q = torch.ones(1, 1, 2, 8, 2)
    assert route_regions(q, q, (2, 2), 2).tolist() == [[[0, 1]] * 4]


def test_all_regions_are_global_attention():
    for grid, region in (((6, 8), (3, 2)), ((7, 5), (2, 2))):
        q, k, v = (rand(2, 2, *grid, 4, seed=s) for s in range(3))
        regions = len(pixels(grid, region))
        index = torch.randperm(regions).expand(1, regions, regions)
        want = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))
        got = region_attend(q, k, v, index, region)
        torch.testing.assert_close(got.flatten(2, 3), want)


def test_the_own_region_is_window_attention():
    q, k, v = (rand(2, 2, 6, 8, 4, seed=s) for s in range(3))

    def cut(x):
        return x.unflatten(2, (2, 3)).unflatten(4, (2, 4)).movedim(4, 3).flatten(4, 5)

    want = F.scaled_dot_product_attention(*(cut(x) for x in (q, k, v)))
    got = region_attend(q, k, v, torch.arange(4)[None, :, None], (3, 4))
    torch.testing.assert_close(cut(got), want)


def test_the_layout_lists_the_chosen_share_and_nothing_else():
    index = route_regions(rand(2, 2, 8, 12, 4), rand(2, 2, 8, 12, 4, seed=1), (2, 3), 3)
    layout = region_layout(index[:, None], (8, 12), (2, 3))
    assert layout.density == 3 / 16 and not layout.partial.any() and layout.mask is None
    # a grid that regions do not divide: padding is listed, but not allowed
    index = torch.arange(6).expand(1, 1, 6, 6)
    cut = region_layout(index, (3, 5), (2, 2))
    assert isinstance(cut, BlockLayout) and (cut.n, cut.m) == (24, 24)
    assert cut.allowed_pairs() == 24 * 15
    assert cut.partial[0, 0, 0].tolist() == [False, False, True, True, True, True]


def test_masking_in_words_is_the_same():
    """The dense form: every pair of pixels whose regions are connected."""
    module = BiLevelRoutingAttention(8, heads=2, n_win=2, topk=2, side_dwconv=0).double()
    x = rand(2, 8, 4, 6)
    chosen = module.regions(x)
    at = torch.arange(24)
    region = at // 6 // 2 * 2 + at % 6 // 3
    connected = torch.zeros(2, 4, 4, dtype=torch.bool).scatter_(2, chosen, True)
    mask = connected[:, region][:, :, region]
    q, k, v = module.qkv_linear(x).flatten(2).mT.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=8**-0.5)
    want = module.output_linear(out.transpose(2, 3).flatten(1, 2).unflatten(-1, (4, 6)))
    torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (2, 3)])
def test_no_gradient_passes_the_choice(size):
    q, k = (rand(1, 2, *size, 3, seed=s).requires_grad_() for s in range(2))
    index = route_regions(q, k, (2, 2), 1)
    assert not index.requires_grad
    module = BiLevelRoutingAttention(4, heads=2, n_win=2, topk=2).double()
    x = rand(2, 4, *size)
    module(x).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    # the same with the choice given from outside
    fixed = module.regions(x)
    module.route = lambda q, k, region: fixed
    module.zero_grad()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, grads[name])


def test_padding_is_no_key():
    """Where `S` does not divide a side the authors let zeros into the softmax. Here what lies beside
    the image has no say: a frame of other pixels changes nothing but the convolution."""
    module = BiLevelRoutingAttention(4, heads=1, n_win=2, topk=9, side_dwconv=0).double()
    x = rand(1, 4, 5, 5)
    q, k, v = module.qkv_linear(x).flatten(2).mT.unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    want = module.output_linear(out[:, 0].mT.unflatten(-1, (5, 5)))
    torch.testing.assert_close(module(x), want)


def test_gradients_dtypes_and_empty_batches():
    index = torch.tensor([[[0, 2], [1, 3], [3, -1], [0, 1]]])

    def fn(q, k, v):
        return region_attend(q, k, v, index, (2, 2))

    q, k, v = (rand(1, 2, 3, 4, 2, seed=s).requires_grad_() for s in range(3))
    assert torch.autograd.gradcheck(fn, (q, k, v))
    want = fn(q, k, v)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        out = fn(*(x.to(dtype) for x in (q, k, v)))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    module = BiLevelRoutingAttention(8, n_win=2)
    assert module(torch.zeros(0, 8, 4, 4)).shape == (0, 8, 4, 4)
    assert module.to(torch.bfloat16)(torch.zeros(1, 8, 5, 4).bfloat16()).dtype == torch.bfloat16


def test_bad_input_is_named():
    q = torch.zeros(1, 2, 4, 4, 3)
    index = torch.zeros(1, 4, 1, dtype=torch.int64)
    for call, words in (
        (lambda: region_attend(q[0], q, q, index, (2, 2)), "q must be .batch, heads, rows"),
        (lambda: region_attend(q, q, q[:, :, :2], index, (2, 2)), "v is on a grid"),
        (lambda: region_attend(q, q, q, index, (2, 0)), "two integers >= 1"),
        (lambda: region_attend(q, q, q, index, (4, 2)), r"index must be .batch, 2, K"),
        (lambda: region_attend(q, q, q, index + 4, (2, 2)), r"must lie in \[-1, 4\), got 4 to 4"),
        (lambda: route_regions(q, q[..., :2], (2, 2)), "agree but for rows and columns"),
        (lambda: route_regions(q, q, (2, 2), 5), r"topk must lie in \[1, 4\], got 5"),
        (lambda: BiLevelRoutingAttention(8)(torch.zeros(1, 8, 6, 9)), "smaller than n_win = 7"),
        (lambda: BiLevelRoutingAttention(8, side_dwconv=4), "must be odd"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
