"""Rotary positions against complex numbers, transformers' Llama and their defining property."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama as llama

from regard.core.rope import rope


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "at",
    [
        torch.arange(6),
        torch.tensor([[[3]], [[-7]]]),
        (9 * rand(2, 3, 6, seed=1)).long(),
        rand(2, 3, 6, seed=2).long(),
        rand(2, 1, 6, seed=3),
    ],
)
def test_is_the_complex_rotation(at):
    x = rand(2, 3, 6, 8)
    angle = at[..., None] * 50.0 ** -(torch.arange(0, 8, 2).double() / 8)
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    want = torch.cat([z.real, z.imag], -1)
    torch.testing.assert_close(rope(x, at, 50.0), want)
    low = rope(x.bfloat16(), at, 50.0)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, rtol=3e-2, atol=3e-2)


def test_is_llamas():
    config = llama.LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    x, at = rand(2, 3, 6, 8).float(), torch.arange(100, 106).expand(2, 6)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, at)
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(rope(x, at[:, None]), want, rtol=1e-4, atol=1e-4)


def test_depends_on_differences_also_far_out():
    q, k, at = rand(1, 1, 5, 8), rand(1, 1, 5, 8, seed=1), torch.arange(5)
    near = rope(q, at) @ rope(k, at).mT
    far = rope(q, at + 1_000_000) @ rope(k, at + 1_000_000).mT
    torch.testing.assert_close(near, far, rtol=0, atol=1e-8)
    assert torch.equal(rope(q, torch.zeros(5)), q)
    assert rope(q[:0], at).shape == (0, 1, 5, 8) and rope(q[:, :, :0], at[:0]).shape == (1, 1, 0, 8)


def test_gradients():
    x = rand(1, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.tensor([0, 1, 1])), x)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="7 channels, expected an even"):
        rope(rand(1, 7), torch.arange(1))
    with pytest.raises(ValueError, match="positions are"):
        rope(rand(1, 5, 8), torch.arange(3))
