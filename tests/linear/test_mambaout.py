"""MambaOut: against the formula written out, timm, and limits of the block."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from benchmarks.mambaout import growth
from tests.timm_oracle import timm_module

from regard.linear.mambaout import VARIANTS, GatedCNNBlock, MambaOut, from_timm, mambaout


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dim", "ratio", "kernel"), [(6, 1.0, 7), (5, 0.6, 3), (4, 2.0, 1)])
def test_block_is_its_definition(dim, ratio, kernel):
    block = GatedCNNBlock(dim, 8 / 3, kernel, ratio).double()
    hidden, convolved = int(8 / 3 * dim), int(ratio * dim)
    x = rand(2, 5, 4, dim)
    u = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    u = u * block.norm.weight + block.norm.bias
    all_ = u @ block.fc1.weight.T + block.fc1.bias
    gate, same, c = (
        all_[..., :hidden],
        all_[..., hidden : 2 * hidden - convolved],
        all_[..., -convolved:],
    )
    mixed = torch.zeros_like(c)
    r = kernel // 2
    for y in range(5):
        for z in range(4):
            for a in range(-r, r + 1):
                for b in range(-r, r + 1):
                    if 0 <= y + a < 5 and 0 <= z + b < 4:
                        mixed[:, y, z] += block.conv.weight[:, 0, a + r, b + r] * c[:, y + a, z + b]
    mixed = mixed + block.conv.bias
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    out = (gelu * torch.cat([same, mixed], -1)) @ block.fc2.weight.T + block.fc2.bias
    torch.testing.assert_close(block(x), x + out)


def test_a_convolution_that_does_nothing_leaves_a_gated_mlp():
    block = GatedCNNBlock(6).double()
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.weight[:, 0, 3, 3] = 1.0
        block.conv.bias.zero_()
    x = rand(1, 3, 8, 6)
    gate, value = block.fc1(block.norm(x)).chunk(2, dim=-1)
    torch.testing.assert_close(block(x), x + block.fc2(F.gelu(gate) * value))
    with torch.no_grad():
        block.fc2.weight.zero_()
        block.fc2.bias.zero_()
    assert torch.equal(block(x), x)


def test_the_causal_form_sees_no_later_token():
    block = GatedCNNBlock(6, kernel=5, causal=True)
    x = rand(2, 12, 6).float()
    before = block(x)
    x[:, 7:] += 1.0
    after = block(x)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])
    assert block(x[:, :1]).shape == (2, 1, 6) and block(x[:0]).shape == (0, 12, 6)


def test_gradients():
    block = GatedCNNBlock(3, kernel=3).double()
    assert torch.autograd.gradcheck(block, rand(1, 3, 2, 3).requires_grad_())


def test_timms_weights_give_timms_numbers():
    with timm_module("timm.models.mambaout") as timm:
        theirs = timm.mambaout_femto(num_classes=7).eval()
    ours = mambaout("femto", 7).eval()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    x = rand(2, 3, 64, 96).float()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=5e-6, rtol=1e-5)


def test_variants():
    counted = {"femto": 7.3e6, "kobe": 9.1e6, "tiny": 26.5e6, "small": 48.5e6, "base": 84.8e6}
    for name in VARIANTS:
        with torch.device("meta"):
            net = mambaout(name)
        found = sum(p.numel() for p in net.parameters())
        assert found == pytest.approx(counted[name], rel=0.01), name


def test_dropped_branches_only_in_training():
    torch.manual_seed(0)
    net = MambaOut((2, 2), (8, 8), 3, drop_path=0.9)
    x = rand(4, 3, 16, 16).float()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_cost_is_linear_in_pixels():
    assert all("N^1.00" in row["note"] for row in growth())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedCNNBlock(4, kernel=4), "kernel must be odd, got 4"),
        (
            lambda: GatedCNNBlock(4, conv_ratio=3.0),
            "makes 12 channels, expected 1 to the 10 hidden",
        ),
        (lambda: GatedCNNBlock(4, drop_path=1.0), "drop_path must lie in"),
        (lambda: GatedCNNBlock(4)(torch.zeros(1, 4, 5, 5)), "4 channels last, got"),
        (lambda: MambaOut((1, 1), (8,)), "equally many, got 2 and 1"),
        (lambda: mambaout("huge"), "variant must be one of femto"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
