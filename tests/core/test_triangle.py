"""Inverses of unit triangular matrices against PyTorch's solver and general inverse."""

from __future__ import annotations

import pytest
import torch

from regard.core.triangle import unit_lower_inverse


def _drawn(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, dtype=dtype, generator=generator).tril(-1)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 37, 64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 4)])
def test_is_the_inverse(side, lead):
    x = 0.5 * _drawn(*lead, side, side)
    want = torch.linalg.inv(torch.eye(side, dtype=x.dtype) + x)
    assert torch.allclose(unit_lower_inverse(x), want, rtol=1e-9, atol=1e-12)


def test_only_what_is_below_the_diagonal_is_read():
    x = _drawn(2, 9, 9)
    other = x + torch.full_like(x, 5.0).triu()
    assert torch.equal(unit_lower_inverse(x), unit_lower_inverse(other))


def test_gradients():
    x = _drawn(2, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(unit_lower_inverse, x)
    assert torch.autograd.gradgradcheck(unit_lower_inverse, x)


def test_keys_that_are_nearly_equal_lose_no_digits():
    torch.manual_seed(0)
    base = torch.randn(1, 64)
    k = torch.nn.functional.normalize(base + 1e-2 * torch.randn(4, 64, 64), dim=-1)
    x, right = (k @ k.mT).tril(-1), torch.randn(4, 64, 8)
    exact = torch.linalg.solve_triangular(
        x.double(), right.double(), upper=False, unitriangular=True
    )
    solved = torch.linalg.solve_triangular(x, right, upper=False, unitriangular=True)
    ours = (unit_lower_inverse(x) @ right - exact).abs().max()
    assert ours < 4 * (solved - exact).abs().max()
