"""LightNet's positions, layer, block and model: written out, streamed, and padded."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from benchmarks import lightnet as benchmark

from regard.linear.lightnet import lightnet_attention
from regard.linear.lightnet_layer import LightNetAttention
from regard.linear.lightnet_model import LightNetBlock, LightNetModel
from regard.linear.lightnet_pe import MDLRPE, MDTPE, TPE, grid_index, md_lrpe


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind, *args, seed=0, **options):
    torch.manual_seed(seed)
    return kind(*args, **options).double().eval()


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize(("width", "extra", "special"), [(6, 0, 0), (5, 2, 3)])
def test_md_lrpe_is_its_definition(grid, width, extra, special):
    axes = len(grid)
    channels = -(-width // axes) + extra
    theta = rand(2, channels, seed=1)
    places = list(itertools.product(*(range(side) for side in grid)))
    x = rand(2, 2, special + len(places), width)
    out = md_lrpe(x, theta, grid, special)
    assert out.shape == (*x.shape[:3], 2 * width)
    for h in range(2):
        for n in range(x.shape[2]):
            for c in range(width):
                angle = torch.tensor(0.0).double()
                if n >= special:
                    angle = places[n - special][c // channels] * theta[h, c % channels]
                want = torch.stack([x[:, h, n, c] * angle.cos(), x[:, h, n, c] * angle.sin()], -1)
                torch.testing.assert_close(out[:, h, n, [c, width + c]], want)
    index = grid_index(torch.arange(len(places)), grid)
    assert index.tolist() == [list(place) for place in places]


def test_md_lrpe_module_and_its_theta():
    module = make(MDLRPE, 2, 5, 3)
    assert module.theta.shape == (2, 2)
    torch.testing.assert_close(
        module.theta.flatten(), 10000.0 ** (-torch.arange(4).double() / 2), rtol=1e-6, atol=0
    )
    x = rand(1, 2, 9, 5)
    want = md_lrpe(x, module.theta, (2, 2, 2), 1)
    assert torch.equal(module(x, (2, 2, 2), 1), want)
    with pytest.raises(ValueError, match=r"theta must be .heads, at least 3. for 2 axes"):
        md_lrpe(x, rand(2, 2), (3, 3))


def filtered(module, x):
    """A TPE before its norm, as sums over the tokens."""
    heads = module.heads
    rate = module.log_decay.sigmoid()
    weight = (module.q * module.k).unflatten(0, (heads, -1)).sum(-1)
    out = torch.zeros_like(x)
    width = x.shape[-1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for t in range(x.shape[1]):
            for s in range(t + 1):
                out[:, t, part] += rate[h] ** (t - s) * weight[h] * x[:, s, part]
    return module.o_proj(F.rms_norm(out, (x.shape[-1],), module.norm.weight, 1e-5))


def test_tpe_is_an_exponential_filter():
    module, x = make(TPE, 8, 2), rand(2, 13, 8)
    whole, last = module(x, return_state=True)
    torch.testing.assert_close(whole, filtered(module, x))
    state, parts = None, []
    for part in x.split([1, 1, 6, 5], 1):
        out, state = module(part, state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 3:6] = False
    torch.testing.assert_close(module(x, mask=mask)[1:, mask[1]], module(x[1:, mask[1]]))


def test_md_tpe_filters_along_every_axis():
    module, x = make(MDTPE, 8, 2, 2), rand(2, 15, 8)
    grid = x.unflatten(1, (3, 5))
    down, across = module.tpes
    want = torch.zeros_like(grid)
    for column in range(5):
        want[:, :, column] += filtered(down, grid[:, :, column])
    for line in range(3):
        want[:, line] += filtered(across, grid[:, line])
    torch.testing.assert_close(module(x, (3, 5)), want.flatten(1, 2))


@pytest.mark.parametrize("author", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_layer_is_written_out(author, causal):
    options = {"axes": 2, "causal": causal}
    if author:
        options |= {
            "gate_rank": 4,
            "gate": "sigmoid",
            "gate_first": True,
            "initial_mass": 1,
            "scale": 1.0,
        }
    module, x = make(LightNetAttention, 12, 3, **options), rand(2, 6, 12)
    torch.nn.init.uniform_(module.g_norm.weight)
    q = F.silu(x @ module.q_proj.weight.T)
    k, v = (x @ p.weight.T for p in (module.k_proj, module.v_proj))
    q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q, k, v))
    mass = 1 if author else 0
    rows = []
    for t in range(6):
        seen = slice(0, t + 1 if causal else 6)
        weight = k[:, :, seen].exp()
        weight = weight / (weight.sum(2, keepdim=True) + mass)
        keys = module.lrpe(F.pad(weight, (0, 0, 0, 6 - weight.shape[2])), (2, 3))
        turned = module.lrpe(q, (2, 3))[:, :, t : t + 1]
        rows.append(turned @ (keys[:, :, seen].mT @ v[:, :, seen]))
    out = torch.cat(rows, 2) * (1.0 if author else 0.5)
    out = out.transpose(1, 2).flatten(2)
    gate = x @ module.g_proj[0].weight.T @ module.g_proj[1].weight.T
    weight = module.g_norm.weight
    if author:
        out = F.rms_norm(out * gate.sigmoid(), (12,), weight, 1e-5)
    else:
        out = F.rms_norm(out, (12,), weight, 1e-5) * gate * gate.sigmoid()
    torch.testing.assert_close(module(x, (2, 3)), out @ module.o_proj.weight.T)


@pytest.mark.parametrize(
    ("axes", "grid"), [(0, None), (1, None), (1, (90,)), (2, (9, 10)), (3, (3, 3, 10))]
)
def test_one_call_is_many_calls(axes, grid):
    module, x = make(LightNetAttention, 8, 2, 3, axes=axes), rand(2, 90, 8)
    whole, last = module(x, grid, return_state=True)
    assert torch.equal(whole, module(x, grid))
    for sizes in ([1] * 90, [70, 20], [3, 1, 64, 22]):
        state, parts = None, []
        for part in x.split(sizes, 1):
            out, state = module(part, grid, state, return_state=True)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state.attention.memory, last.attention.memory)
        torch.testing.assert_close(state.attention.mass, last.attention.mass)
        assert torch.equal(state.position, last.position)


def test_layer_and_model_skip_padding():
    for kind, sizes in ((LightNetAttention, (8, 2, 3)), (LightNetModel, (8, 2, 2, 12, 3))):
        options = {"axes": 1} if kind is LightNetAttention else {}
        module, x = make(kind, *sizes, **options), rand(2, 12, 8)
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, :4] = False
        mask[1, 5:8] = False
        out, state = module(x, mask=mask, return_state=True)
        more = rand(2, 3, 8, seed=1)
        after = module(more, None, state)
        for b in range(2):
            alone = module(torch.cat([x[b : b + 1, mask[b]], more[b : b + 1]], 1))
            torch.testing.assert_close(out[b : b + 1, mask[b]], alone[:, :-3])
            torch.testing.assert_close(after[b : b + 1], alone[:, -3:])


def test_model_streams():
    module, x = make(LightNetModel, 8, 3, 2, 12, 3), rand(2, 40, 8)
    whole = module(x)
    for sizes in ([1] * 40, [17, 23]):
        state, parts = None, []
        for part in x.split(sizes, 1):
            out, state = module(part, None, state, return_state=True)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_names_are_flash_linear_attentions():
    names = {f"{x}_proj.weight" for x in "qkvo"}
    names |= {"g_proj.0.weight", "g_proj.1.weight", "g_norm.weight"}
    module = LightNetAttention(16, 2)
    assert set(module.state_dict()) == names
    assert module.g_proj[0].weight.shape == (128, 16)


def test_without_positions_the_order_of_tokens_is_unknown():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    x = rand(1, 12, 8)
    blind = make(LightNetModel, 8, 2, 2, 12, 3, axes=2, causal=False, positions=False)
    torch.testing.assert_close(blind(x[:, order], (3, 4)), blind(x, (3, 4))[:, order])
    sees = make(LightNetModel, 8, 2, 2, 12, 3, axes=2, causal=False)
    gap = (sees(x[:, order], (3, 4)) - sees(x, (3, 4))[:, order]).abs().max()
    assert gap > 0.1


def test_block_is_residual():
    block, x = make(LightNetBlock, 8, 2, 12, 3, axes=1), rand(2, 7, 8)
    y = x + block.token_mixer(block.token_norm(x))
    norm = block.channel_norm(y)
    glu = block.channel_mixer
    want = y + glu.w3(F.silu(glu.w1(norm)) * glu.w2(norm))
    torch.testing.assert_close(block(x), want)
    assert block(x[:0]).shape == (0, 7, 8)


def test_heads_of_angles_meet_shared_keys():
    q, k, v = rand(1, 4, 6, 3), rand(1, 2, 6, 3, seed=1), rand(1, 2, 6, 3, seed=2)
    angles = rand(1, 1, 6, 3, seed=3)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    for causal in (True, False):
        out = lightnet_attention(q, k, v, angles=angles, causal=causal)
        torch.testing.assert_close(out, lightnet_attention(q, *wide, angles=angles, causal=causal))


def test_training_repeats():
    first = benchmark.learn(True, steps=3, side=4, batch=4)
    assert first == benchmark.learn(True, steps=3, side=4, batch=4)


@pytest.mark.slow
def test_positions_are_learned_from():
    with_, without = (benchmark.learn(x, steps=300)[1] for x in (True, False))
    assert with_ > 0.7 and without < 0.4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LightNetAttention(8, 3), "heads must divide dim 8, got 3"),
        (lambda: LightNetAttention(8, 2, axes=-1), "axes >= 0"),
        (lambda: LightNetAttention(8, 2, axes=2)(torch.zeros(1, 4, 8), (4,)), "2 axes"),
        (lambda: LightNetModel(8, 0, 2), "layers and axes must be >= 1"),
        (lambda: LightNetModel(8, 1, 2, causal=False, axes=2)(torch.zeros(1, 4, 8)), "MDTPE: got"),
        (lambda: TPE(8, 0), "heads must divide dim 8, got 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
