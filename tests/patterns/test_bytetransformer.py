"""The packed encoder layer against its equations and against PyTorch's own padded layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regard.core.varlen import pack
from regard.patterns.bytetransformer import PackedEncoderLayer

LENGTHS = [5, 12, 1, 0, 9, 5]


def setup(dtype=torch.float64, dim=16, heads=2):
    torch.manual_seed(0)
    layer = PackedEncoderLayer(dim, heads, hidden=24).to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer, torch.randn(len(LENGTHS), 12, dim, dtype=dtype)


def norm(x, layer):
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    return centered / (variance + 1e-5).sqrt() * layer.weight + layer.bias


def test_equals_the_equations_in_float64():
    layer, x = setup()
    got = layer.padded(x, torch.tensor(LENGTHS))
    for b, length in enumerate(LENGTHS):
        one = x[b, :length]
        q, k, v = (one @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
        mixed = torch.zeros_like(one)
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(8), -1)
            mixed[:, part] = weights @ v[:, part]
        h = norm(mixed @ layer.out.weight.T + layer.out.bias + one, layer.norm1)
        inner = h @ layer.inner.weight.T + layer.inner.bias
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        y = norm(gelu @ layer.outer.weight.T + layer.outer.bias + h, layer.norm2)
        torch.testing.assert_close(got[b, :length], y)
        assert not got[b, length:].any()


def test_equals_pytorchs_padded_layer_and_its_gradients():
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 40, dropout=0.0, activation="gelu", batch_first=True, dtype=torch.float64
    )
    ours = PackedEncoderLayer.from_torch(theirs)
    x = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([9, 2, 6])
    valid = torch.arange(9) < lengths[:, None]
    want = theirs(x, src_key_padding_mask=~valid) * valid[..., None]
    got = ours.padded(x, lengths)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    found = torch.autograd.grad((got * weight).sum(), [x, ours.qkv.weight, ours.norm2.bias])
    asked = [x, theirs.self_attn.in_proj_weight, theirs.norm2.bias]
    for a, b in zip(found, torch.autograd.grad((want * weight).sum(), asked), strict=True):
        torch.testing.assert_close(a, b)
    assert not found[0][~valid].any()


def test_independent_of_padding_and_batch_composition():
    layer, x = setup()
    whole = layer.padded(x, torch.tensor(LENGTHS))
    wider = torch.cat([x, torch.full_like(x, math.nan)], 1)
    torch.testing.assert_close(layer.padded(wider, torch.tensor(LENGTHS))[:, :12], whole)
    some = torch.tensor([4, 0, 2])
    part = layer.padded(x[some], torch.tensor(LENGTHS)[some])
    torch.testing.assert_close(part, whole[some])


def test_equal_lengths_are_the_ordinary_layer():
    layer, x = setup()
    packed = pack(x, [12] * 6)
    out = layer(packed.x, packed.cu_seqlens)
    torch.testing.assert_close(layer.padded(x, torch.tensor([12] * 6)), out.view_as(x))


def test_any_tokens_may_count():
    layer, x = setup()
    keep = torch.rand(6, 12) > 0.5
    got = layer.padded(x, keep)
    alone = layer.padded(x[:1, keep[0]], torch.tensor([int(keep[0].sum())]))
    torch.testing.assert_close(got[0, keep[0]], alone[0])


def test_state_dict_round_trip_and_dropout():
    layer, x = setup()
    other = PackedEncoderLayer(16, 2, hidden=24, dropout=0.5).double()
    other.load_state_dict(layer.state_dict())
    lengths = torch.tensor(LENGTHS)
    torch.testing.assert_close(other.eval().padded(x, lengths), layer.padded(x, lengths))
    assert not torch.equal(other.train().padded(x, lengths), layer.padded(x, lengths))


def test_bad_input_names_itself():
    with pytest.raises(ValueError, match="heads is 3, which does not divide dim's 16"):
        PackedEncoderLayer(16, 3)
    with pytest.raises(ValueError, match="norm_first=False"):
        PackedEncoderLayer.from_torch(nn.TransformerEncoderLayer(8, 2, activation="relu"))
