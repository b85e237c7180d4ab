"""HaloNet against the loop over pixels, timm, and the cases in which it is ordinary attention."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from benchmarks.halonet import equivariance, growth, storage

from regard import attend
from regard.patterns.halonet import Halo, HaloAttention, HaloBlock, halo_attention


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def loop(q, k, v, block, halo, bias, mask_padding, scale_pos):
    """Eq. 1, one query at a time."""
    batch, heads, rows, columns, dim = q.shape
    height, width, stride = k.shape[2], k.shape[3], k.shape[2] // q.shape[2]
    window, tau = block + 2 * halo, dim**-0.5
    out = q.new_zeros(batch, heads, rows, columns, v.shape[-1])
    for b, h, y, x in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows, columns))):
        iy, ix = y % (block // stride), x % (block // stride)
        top, left = y * stride // block * block - halo, x * stride // block * block - halo
        scores, values = [], []
        for jy in range(window):
            for jx in range(window):
                ky, kx = top + jy, left + jx
                inside = 0 <= ky < height and 0 <= kx < width
                if not inside and mask_padding:
                    continue
                term = q[b, h, y, x] @ (
                    bias[0][jy - iy + window - 1] + bias[1][jx - ix + window - 1]
                )
                content = q[b, h, y, x] @ k[b, h, ky, kx] if inside else 0.0
                scores.append(tau * content + (tau * term if scale_pos else term))
                values.append(v[b, h, ky, kx] if inside else torch.zeros_like(v[0, 0, 0, 0]))
        out[b, h, y, x] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("grid", "block", "halo"), [((8, 4), 4, 1), ((4, 6), 2, 2), ((4, 4), 4, 0)]
)
def test_equals_the_loop_over_pixels(grid, block, halo, stride, mask_padding):
    y, x = grid
    q = rand(2, 2, y // stride, x // stride, 3)
    k, v = rand(2, 2, y, x, 3, seed=1), rand(2, 2, y, x, 5, seed=2)
    bias = rand(2, 2 * (block + 2 * halo) - 1, 3, seed=3).unbind()
    for scale_pos in (False, True):
        options = {"mask_padding": mask_padding, "scale_pos": scale_pos}
        got = halo_attention(q, k, v, block, halo, bias, **options)
        torch.testing.assert_close(got, loop(q, k, v, block, halo, bias, **options))


@pytest.fixture(scope="module")
def timm_attention():
    """timm's `HaloAttn`, without timm's own start, which imports torchvision."""
    found = find_spec("timm")
    assert found is not None, "timm is missing: pip install --no-deps timm, as the Makefile does"
    before = {n: m for n, m in sys.modules.items() if n == "timm" or n.startswith("timm.")}
    for name in before:
        del sys.modules[name]
    root = found.submodule_search_locations[0]
    for name, path in (("timm", root), ("timm.layers", f"{root}/layers")):
        bare = ModuleType(name)
        bare.__path__ = [path]
        sys.modules[name] = bare
    try:
        yield import_module("timm.layers.halo_attn").HaloAttn
    finally:
        for name in [n for n in sys.modules if n == "timm" or n.startswith("timm.")]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.parametrize(
    ("grid", "block", "halo", "options"),
    [
        ((8, 8), 4, 1, {}),
        ((8, 16), 8, 3, {"scale_pos_embed": True, "dim_head": 5}),
        ((12, 6), 6, 4, {"stride": 2, "qkv_bias": True}),
        ((9, 6), 3, 2, {"stride": 2}),
        ((8, 8), 4, 1, {"stride": 2, "avg_down": True, "qk_ratio": 0.5}),
        ((8, 4), 4, 0, {"qkv_bias": True}),
    ],
)
def test_weights_of_timm_load_and_give_its_numbers(timm_attention, grid, block, halo, options):
    torch.manual_seed(0)
    theirs = timm_attention(16, 24, num_heads=2, block_size=block, halo_size=halo, **options)
    names = {"scale_pos_embed": "scale_pos"}
    ours = HaloAttention(
        16,
        24,
        heads=2,
        block=block,
        halo=halo,
        mask_padding=False,
        **{names.get(name, name): value for name, value in options.items()},
    )
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.double(), theirs.double()
    x = rand(2, 16, *grid)
    results = []
    for net in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        inputs = [leaf, *(p for _, p in sorted(net.named_parameters()))]
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_block_without_halo_is_full_attention():
    q, k, v = rand(1, 2, 4, 4, 3), rand(1, 2, 4, 4, 3, seed=1), rand(1, 2, 4, 4, 3, seed=2)
    want = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))
    torch.testing.assert_close(halo_attention(q, k, v, 4, 0).flatten(2, 3), want)
    # A halo that reaches everything from everywhere sees everything too.
    torch.testing.assert_close(halo_attention(q, k, v, 2, 2).flatten(2, 3), want)


def test_without_halo_it_is_attention_within_windows():
    q, k, v = (rand(1, 2, 6, 9, 4, seed=s) for s in range(3))

    def cut(x):
        return x.unflatten(2, (2, 3)).unflatten(4, (3, 3)).movedim(4, 3).flatten(4, 5)

    want = F.scaled_dot_product_attention(*(cut(x) for x in (q, k, v)))
    torch.testing.assert_close(cut(halo_attention(q, k, v, 3, 0)), want)


def test_the_mask_alone_is_the_function_without_tables():
    q, k, v = (rand(2, 4, 8, 12, 5, seed=s) for s in range(3))
    k, v = k[:, :2], v[:, :2]
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    for backend in ("auto", "reference", "blocks"):
        got = attend(*flat, mask=Halo((8, 12), 4, 2), backend=backend)
        torch.testing.assert_close(got.unflatten(2, (8, 12)), halo_attention(q, k, v, 4, 2))


def test_exact_blocks_list_no_other_pair():
    for grid, block, halo, stride, padded in (
        ((16, 24), 8, 3, 1, False),
        ((16, 24), 8, 2, 2, False),
        ((12, 12), 4, 4, 1, True),
        ((12, 6), 6, 0, 2, False),
    ):
        mask = Halo(grid, block, halo, stride, padded)
        layout = mask.layout(mask.queries, mask.keys, mask.exact_blocks)
        dense = mask.dense(mask.queries, mask.keys)
        assert not layout.partial.any() and layout.listed_pairs() == int(dense.sum())


def test_layouts_of_grids_that_tiles_do_not_divide():
    mask = Halo((9, 15), 3, 1)
    for block in ((16, 8), (9, 4), (20, 7)):
        layout = mask.layout(135, 135, block)
        assert layout.perm_k is None
        assert torch.equal(layout.dense()[0, 0], mask.dense(135, 135))
    some, every = mask.tile(*(torch.tensor(x) for x in (0, 2, 45, 49)))
    assert bool(some) and not bool(every)


def test_weights_have_timms_names():
    module = HaloAttention(8, heads=2, qkv_bias=True)
    assert sorted(module.state_dict()) == [
        "kv.bias",
        "kv.weight",
        "pos_embed.height_rel",
        "pos_embed.width_rel",
        "q.bias",
        "q.weight",
    ]
    block = HaloBlock(8, 16, HaloAttention(8, heads=2, stride=2), stride=2)
    assert {name.rsplit(".", 1)[0] for name in block.state_dict()} == {
        *("conv1_1x1.conv", "conv1_1x1.bn", "self_attn.q", "self_attn.kv", "self_attn.pos_embed"),
        *("post_attn", "conv3_1x1.conv", "conv3_1x1.bn", "shortcut.conv.conv", "shortcut.conv.bn"),
    }
    assert HaloBlock(8, 8, HaloAttention(4, heads=2)).shortcut is None


def test_position_terms_of_unused_offsets_get_no_gradient():
    module = HaloAttention(8, heads=2, block=4, halo=1).double()
    module(rand(1, 8, 8, 8)).square().sum().backward()
    # Only offsets 2 h .. 2 w - 2 occur (queries count without the halo).
    grad = module.pos_embed.height_rel.grad
    assert (grad[:2] == 0).all() and (grad[2:].abs().sum(-1) > 0).all()


def test_claims():
    (row,) = storage()
    assert "3.06" in row["note"] and "49" in row["note"]
    shifted = {row["name"]: row["note"] for row in equivariance()}
    errors = {name: float(note.split()[2]) for name, note in shifted.items()}
    assert errors["shift by 4"] < 1e-12 and min(errors["shift by 1"], errors["shift by 2"]) > 0.1
    (row,) = growth()
    assert float(row["note"].split("N^")[1].split()[0]) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: halo_attention(q[0], q, q, 2, 1), r"q must be \(batch, heads, rows"),
        (
            lambda q: halo_attention(q, q, q[:, :, :2], 2, 1),
            r"v is on a grid \(2, 4\), k on \(4, 4\)",
        ),
        (lambda q: halo_attention(q[:, :, :3], q, q, 2, 1), r"q is on a grid \(3, 4\)"),
        (lambda q: halo_attention(q, q, q, 3, 1), r"block 3 does not divide the grid \(4, 4\)"),
        (lambda q: halo_attention(q, q, q, 2, 1, (rand(5, 3), rand(7, 3))), r"bias\[0\] has shape"),
        (lambda q: Halo((4, 4), 2, 1).check(16, 9), "made for 16 queries and 16 keys"),
        (lambda q: Halo((4, 4), 0, 1), "block >= 1"),
        (lambda q: Halo((4, 4), 2, 1).layout(16, 16, (8, 0)), "block sides must be >= 1"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call(rand(1, 1, 4, 4, 3))


def test_cost_of_a_block_is_its_window():
    mask = Halo((64, 64), 8, 3)
    assert mask.density(4096) <= mask.window**2 / 4096
    assert math.isclose(Halo((8, 8), 8, 3, padded=True).density(64, 196), 1.0)
