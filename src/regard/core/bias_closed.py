"""Biases with a closed form: linear and learned relative ones, and factors of low rank.

Use them through :mod:`regard.core.bias`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .bias_base import Bias, Index, axis_width, joint_shape


@dataclass(frozen=True, eq=False)
class ALiBi(Bias):
    """Attention with linear biases, `m_h (j - i)` (arXiv 2108.12409, section 3).

    Keys after the query get a positive term, so combine it with `Causal()` as the paper does.

    Attributes:
        slopes: `(H,)` float, `m_h` of every query head.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        if self.slopes.dim() != 1 or not self.slopes.is_floating_point():
            raise ValueError(
                f"ALiBi: slopes has shape {tuple(self.slopes.shape)} and {self.slopes.dtype}, "
                "expected (H,) and a float dtype"
            )

    @classmethod
    def for_heads(cls, heads: int, *, device: torch.device | str | None = None) -> ALiBi:
        """The paper's slopes: `2 ** (-8 (h + 1) / H)` for `h = 0..H-1` where `H` is a power of two.

        For other `H` the paper's rule: the slopes of the next smaller power of two, then every
        other slope of twice that number, from its first.
        """
        if heads < 1:
            raise ValueError(f"ALiBi: heads must be >= 1, got {heads}")
        whole = 2 ** int(math.log2(heads))
        slopes = [2 ** (-8 * (h + 1) / whole) for h in range(whole)]
        slopes += [2 ** (-4 * (h + 1) / whole) for h in range(0, 2 * (heads - whole), 2)]
        return cls(torch.tensor(slopes, dtype=torch.float32, device=device))

    @property
    def heads(self) -> int | None:
        return self.slopes.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def scores(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        shape = joint_shape(i, j, h, b)
        return (self.slopes[h] * (j - i).to(self.slopes.dtype)).expand(shape)

    def factors(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """`m_h [1, -(i - c)]` and `[j - c, 1]`: positions count from the middle `c` of the keys.

        A common origin leaves `j - i` as it is, and halves the largest number that has to be held.
        """
        like, origin = self.slopes, m // 2
        i = torch.arange(m - n, m, device=like.device).to(like.dtype) - origin
        j = torch.arange(m, device=like.device).to(like.dtype) - origin
        phi_q = torch.stack([torch.ones_like(i), -i], -1)
        phi_k = torch.stack([j, torch.ones_like(j)], -1)
        return (like[:, None, None] * phi_q)[None], phi_k[None, None]


@dataclass(frozen=True, eq=False)
class RelativeBias1D(Bias):
    """A learned value for each head and signed distance (Shaw et al., arXiv 1803.02155, eq. 4).

    Attributes:
        table: `(H, 2 L - 1)` float; entry `d + L - 1` is the term for `j - i = d`. Distances beyond
            `L - 1` are clipped to it, as in the paper.
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.dim() != 2 or self.table.shape[1] % 2 == 0:
            raise ValueError(
                f"RelativeBias1D: table has shape {tuple(self.table.shape)}, expected (H, 2 L - 1)"
            )

    @property
    def heads(self) -> int | None:
        return self.table.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def scores(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        shape = joint_shape(i, j, h, b)
        reach = self.table.shape[1] // 2
        return self.table[h, (j - i).clamp(-reach, reach) + reach].expand(shape)


@dataclass(frozen=True, eq=False)
class RelativeBias2D(Bias):
    """A learned value for each head and offset on a grid (Swin, arXiv 2103.14030, eq. 4).

    Attributes:
        table: `(H, 2 h - 1, 2 w - 1)` float; entry `[dy + h - 1, dx + w - 1]` is the term for a
            query `dy` rows below and `dx` columns right of the key, as in Swin's code.
        grid: `(h, w)`; the keys are exactly this grid, row by row.
    """

    table: Tensor
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        height, width = self.grid
        want = (2 * height - 1, 2 * width - 1)
        if self.table.dim() != 3 or tuple(self.table.shape[1:]) != want:
            raise ValueError(
                f"RelativeBias2D: table has shape {tuple(self.table.shape)}, expected "
                f"(H, {want[0]}, {want[1]}) for a grid of {height} x {width}"
            )

    @property
    def heads(self) -> int | None:
        return self.table.shape[0]

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        cells = self.grid[0] * self.grid[1]
        if m != cells or n > m:
            raise ValueError(
                f"RelativeBias2D: made for a grid of {cells} tokens, but the call has {n} queries "
                f"and {m} keys"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def scores(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        shape = joint_shape(i, j, h, b)
        height, width = self.grid
        # A kernel's padding may lie outside the grid; it may read anything.
        i, j = i.clamp(0, height * width - 1), j.clamp(0, height * width - 1)
        down = torch.div(i, width, rounding_mode="floor") - torch.div(
            j, width, rounding_mode="floor"
        )
        right = i % width - j % width
        return self.table[h, down + height - 1, right + width - 1].expand(shape)


@dataclass(frozen=True, eq=False)
class LowRankBias(Bias):
    """`phi_q phi_k^T`, never multiplied out (FlashBias, arXiv 2505.12044, eq. 4).

    Attributes:
        phi_q: `([B,] [H,] N, R)` float, row `r` is query position `r + M - N`.
        phi_k: `([B,] [H,] M, R)` float.
    """

    phi_q: Tensor
    phi_k: Tensor

    def __post_init__(self) -> None:
        q, k = self.phi_q, self.phi_k
        for name, phi in (("phi_q", q), ("phi_k", k)):
            if not 2 <= phi.dim() <= 4 or not phi.is_floating_point():
                raise ValueError(
                    f"LowRankBias: {name} has shape {tuple(phi.shape)} and {phi.dtype}, expected "
                    "([B,] [H,] length, R) and a float dtype"
                )
        if q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"LowRankBias: phi_q has rank {q.shape[-1]}, phi_k has {k.shape[-1]}, expected one"
            )
        for axis, what in ((3, "heads"), (4, "batch entries")):
            sizes = {axis_width(q, axis), axis_width(k, axis)} - {None}
            if len(sizes) > 1:
                raise ValueError(
                    f"LowRankBias: phi_q has {axis_width(q, axis)} {what}, "
                    f"phi_k {axis_width(k, axis)}"
                )

    @property
    def heads(self) -> int | None:
        return axis_width(self.phi_q, 3) or axis_width(self.phi_k, 3)

    @property
    def batch(self) -> int | None:
        return axis_width(self.phi_q, 4) or axis_width(self.phi_k, 4)

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        rows, cols = self.phi_q.shape[-2], self.phi_k.shape[-2]
        if rows < n or cols != m:
            raise ValueError(
                f"LowRankBias: made for {rows} queries and {cols} keys, "
                f"but the call has {n} and {m}"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.phi_q, self.phi_k

    def scores(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        shape = joint_shape(i, j, h, b)
        row = i + self.phi_q.shape[-2] - self.phi_k.shape[-2]
        q, k = _rows(self.phi_q, row, h, b), _rows(self.phi_k, j, h, b)
        if q.dim() > 2 and q.shape[-2] == 1 and k.dim() > 2 and k.shape[-3] == 1:
            return (q.squeeze(-2) @ k.squeeze(-3).transpose(-1, -2)).expand(shape)
        return (q * k).sum(-1).expand(shape)

    def factors(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        rows = self.phi_q.shape[-2]
        q, k = (phi[(None,) * (4 - phi.dim())] for phi in (self.phi_q, self.phi_k))
        return q[..., rows - n :, :], k


def _rows(phi: Tensor, at: Tensor, h: Index, b: Index) -> Tensor:
    """Rows `at` of `([B,] [H,] length, R)`: `(*broadcast of at, h, b, R)`."""
    phi = phi[(None,) * (4 - phi.dim())]
    at = at.clamp(0, phi.shape[2] - 1)  # a kernel's padding may lie outside
    return phi[0 if phi.shape[0] == 1 else b, 0 if phi.shape[1] == 1 else h, at]
