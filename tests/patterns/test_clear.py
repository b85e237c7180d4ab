"""CLEAR against its equations, and the cases in which it is ordinary attention."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from benchmarks.clear import growth, reduction, train
from torch import nn

from regard import attend, merge
from regard.core.masks import Mask
from regard.patterns.clear import (
    Clear,
    ClearPool,
    clear_attention,
    clear_mask,
    proportional_scale,
)
from regard.patterns.clear_distill import (
    attention_outputs,
    distillation_loss,
    train_attention_only,
)
from regard.patterns.clear_module import ClearAttention


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def allowed(height, width, radius, text):
    """Eq. 4, pair by pair."""
    n = text + height * width
    out = torch.ones(n, n, dtype=torch.bool)
    for i in range(text, n):
        for j in range(text, n):
            (y, x), (ky, kx) = divmod(i - text, width), divmod(j - text, width)
            out[i, j] = (y - ky) ** 2 + (x - kx) ** 2 < radius**2
    return out


def joint_softmax(q, k, v, grid, radius, text, weight=None, scale=None):
    """One softmax over text, circle and pooled keys, all written out."""
    (height, width), f = grid, 0 if weight is None else weight.shape[0]
    seen = allowed(height, width, radius, text)
    if f:
        pooled = []
        for x in (k, v):
            coarse = x.new_zeros(*x.shape[:2], height // f, width // f, x.shape[-1])
            cells = x[:, :, text:].unflatten(2, grid)
            for u in range(f):
                for w in range(f):
                    coarse += weight[u, w] * cells[:, :, u::f, w::f]
            pooled.append(torch.cat([x, coarse.flatten(2, 3)], 2))
        k, v = pooled
        extra = torch.ones(len(seen), k.shape[2] - len(seen), dtype=torch.bool)
        extra[:text] = False
        seen = torch.cat([seen, extra], 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("grid", "radius", "text"), [((6, 8), 2, 3), ((4, 10), 3.5, 0), ((8, 2), 1, 7)]
)
def test_equals_the_definition(grid, radius, text, pooled):
    n = text + grid[0] * grid[1]
    q, k, v = (rand(2, 2, n, 4, seed=s).requires_grad_() for s in range(3))
    pool = weight = None
    if pooled:
        pool = ClearPool(2).double()
        weight = rand(2, 2, seed=5)
        pool.spatial_weight.data.copy_(weight.view(1, 1, 1, 2, 1, 2, 1))
    results = []
    for out in (
        clear_attention(q, k, v, grid=grid, radius=radius, text=text, pool=pool, scale=0.3),
        joint_softmax(q, k, v, grid, radius, text, weight, 0.3),
    ):
        results.append(
            [out, *torch.autograd.grad((out * rand(2, 2, n, 4, seed=9)).sum(), [q, k, v])]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_limits_of_the_radius():
    q, k, v = (rand(1, 2, 35, 4, seed=s) for s in range(3))
    full = F.scaled_dot_product_attention(q, k, v)
    for radius in (math.hypot(4, 6) + 1e-9, 1000, None):
        torch.testing.assert_close(clear_attention(q, k, v, grid=(5, 7), radius=radius), full)
    for radius in (1, 0.2):
        torch.testing.assert_close(clear_attention(q, k, v, grid=(5, 7), radius=radius), v)
    # The boundary is excluded: at r = 2 a point two steps away is not seen.
    row = Clear(1, 5, 2).dense(5)[2]
    assert row.tolist() == [False, True, True, True, False]


def test_parts_merge_into_the_joint_softmax():
    class Circle(Mask):
        def allows(self, i, j, h=0, b=0):
            return Clear(4, 6, 2).allows(i, j)

    q, k, v = (rand(1, 2, 29, 4, seed=s) for s in range(3))
    text = attend(q[:, :, 5:], k[:, :, :5], v[:, :, :5], return_lse=True)
    circle = attend(*(x[:, :, 5:] for x in (q, k, v)), mask=Circle(), return_lse=True)
    pool = ClearPool(2).double()
    coarse = attend(q[:, :, 5:], *(pool(x[:, :, 5:], (4, 6)) for x in (k, v)), return_lse=True)
    got = clear_attention(q, k, v, grid=(4, 6), radius=2, text=5, pool=pool)
    torch.testing.assert_close(got[:, :, 5:], merge([text, circle, coarse])[0])


def test_pooling_starts_as_the_mean():
    x = rand(2, 3, 24, 5)
    got = ClearPool(2).double()(x, (4, 6))
    image = x.transpose(2, 3).reshape(6, 5, 4, 6)
    want = F.avg_pool2d(image, 2).flatten(2).transpose(1, 2).reshape(2, 3, 6, 5)
    torch.testing.assert_close(got, want)
    assert ClearPool(4).spatial_weight.shape == (1, 1, 1, 4, 1, 4, 1)


def test_proportional_scale():
    assert proportional_scale(4608, 64) == pytest.approx(1 / 8)
    assert proportional_scale(4608**2, 64) == pytest.approx(math.sqrt(2) / 8)
    assert proportional_scale(4608, 64, pooled=True) == proportional_scale(46080, 64)


@pytest.mark.parametrize("shape", [(6, 9, 2.5, 0), (4, 4, 9, 3), (1, 7, 2, 1), (8, 3, 3, 0)])
def test_pairs_in_closed_form(shape):
    mask = clear_mask(*shape)
    assert mask == Clear(*shape) and mask.pairs() == int(allowed(*shape).sum())
    layout = mask.layout(mask.tokens, None, (16, 8))
    assert layout.allowed_pairs() == mask.pairs()


def literal_layer(layer, image, text, rotary, grid):
    """FLUX's joint attention, step by step, with the layer's weights."""

    def heads(x):
        return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    def rms(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    def turn(x):
        # Channel pairs as complex numbers times e^(i θ).
        angle = torch.complex(rotary[0][:, ::2], rotary[1][:, ::2])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angle).flatten(
            -2
        )

    q = torch.cat(
        [
            rms(heads(layer.add_q_proj(text)), layer.norm_added_q),
            rms(heads(layer.to_q(image)), layer.norm_q),
        ],
        2,
    )
    k = torch.cat(
        [
            rms(heads(layer.add_k_proj(text)), layer.norm_added_k),
            rms(heads(layer.to_k(image)), layer.norm_k),
        ],
        2,
    )
    v = torch.cat([heads(layer.add_v_proj(text)), heads(layer.to_v(image))], 2)
    length = text.shape[1]
    weight = layer.processor.spatial_weight[0, 0, 0, :, 0, :, 0]
    out = joint_softmax(turn(q), turn(k), v, grid, layer.radius, length, weight)
    out = out.transpose(1, 2).flatten(2)
    return layer.to_out[0](out[:, length:]), layer.to_add_out(out[:, :length])


def test_joint_layer_is_fluxs_attention_within_circles():
    torch.manual_seed(0)
    layer = ClearAttention(12, 3, 2, joint=True, pool=2).double()
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    image, text = rand(2, 24, 12), rand(2, 5, 12, seed=1)
    angle = rand(29, 2, seed=2).repeat_interleave(2, -1)
    rotary = (angle.cos(), angle.sin())
    got = layer(image, text, rotary, grid=(4, 6))
    for a, b in zip(got, literal_layer(layer, image, text, rotary, (4, 6)), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_have_the_official_names():
    joint = ClearAttention(8, 2, joint=True, pool=4)
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    both = [
        f"{p}.{x}" for p in (*projections, "to_out.0", "to_add_out") for x in ("weight", "bias")
    ]
    norms = [f"{x}.weight" for x in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    assert set(joint.state_dict()) == {*both, *norms, "processor.spatial_weight"}
    single = ClearAttention(8, 2)
    assert set(single.state_dict()) < set(joint.state_dict()) and len(single.state_dict()) == 8


def test_distillation_loss():
    a, target, teacher = rand(3, 5, 2), rand(3, 5, 2, seed=1), rand(3, 5, 2, seed=2)
    mine, theirs = (
        [rand(3, 4, seed=3), rand(3, 6, seed=4)],
        [rand(3, 4, seed=5), rand(3, 6, seed=6)],
    )
    teacher.requires_grad_()
    loss = distillation_loss(a.requires_grad_(), target, teacher, mine, theirs)
    flow, output = F.mse_loss(a, target), F.mse_loss(a, teacher)
    matched = (F.mse_loss(mine[0], theirs[0]) + F.mse_loss(mine[1], theirs[1])) / 2
    torch.testing.assert_close(loss.total, flow + 0.5 * output + 0.5 * matched)
    loss.total.backward()
    assert teacher.grad is None and a.grad is not None
    assert distillation_loss(a, target, a).total == distillation_loss(a, target, a).flow
    only = distillation_loss(a, target, teacher, weighting=torch.tensor([0.0, 3.0, 0.0]))
    torch.testing.assert_close(only.flow, F.mse_loss(a[1], target[1]))
    with pytest.raises(ValueError, match="1 attention outputs of the student came with 0"):
        distillation_loss(a, target, teacher, [a], [])
    with pytest.raises(ValueError, match=r"teacher has shape \(3, 5\)"):
        distillation_loss(a, target, teacher[..., 0])


def test_only_attention_weights_train_and_outputs_are_collected():
    net = nn.ModuleDict(
        {"attn": ClearAttention(8, 2, 2, grid=(4, 4), joint=True, pool=2), "mlp": nn.Linear(8, 8)}
    )
    chosen = train_attention_only(net)
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    bases = {name.split("attn.")[1].rsplit(".", 1)[0] for name in names}
    assert bases == {"to_q", "to_k", "to_v", "to_out.0", "processor"}
    assert len(chosen) == len(names)
    with attention_outputs([net["attn"]]) as seen:
        image, _ = net["attn"](torch.randn(1, 16, 8), torch.randn(1, 3, 8))
        assert len(seen) == 1 and torch.equal(seen[0], image)
    net["attn"](torch.randn(1, 16, 8), torch.randn(1, 3, 8))
    assert len(seen) == 1
    with pytest.raises(ValueError, match="no parameter named"):
        train_attention_only(nn.Linear(2, 2))


def test_claims():
    assert [Clear(64, 64, r).circle for r in (8, 16, 32)] == [193, 793, 3205]
    notes = [row["note"] for row in reduction()]
    want = (("75.7%", "99.54%"), ("66.8%", "99.32%"), ("40.9%", "98.46%"))
    assert all(a in note and b in note for note, (a, b) in zip(notes, want, strict=True))
    (row,) = growth()
    allowed_power, listed_power = map(float, re.findall(r"N\^([\d.]+)", row["note"]))
    assert allowed_power == pytest.approx(1, abs=0.1) and listed_power == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_distillation_brings_circles_closer_to_the_teacher():
    (row,) = train(side=6, radius=1.5, steps=60)
    found = re.search(r"from the teacher ([\d.]+) before, ([\d.]+) after", row["note"])
    before, after = map(float, found.groups())
    assert after < 0.8 * before
