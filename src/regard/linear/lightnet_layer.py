"""LightNet's layer (arXiv 2405.21022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lightnet import LightNetState, lightnet_attention
from .lightnet_pe import MDLRPE, grid_index


class LayerState(NamedTuple):
    """What a causal layer keeps between calls.

    Attributes:
        attention: of :func:`regard.linear.lightnet.lightnet_attention`.
        position: integers `(B,)`, tokens seen so far, padding not counted.
    """

    attention: LightNetState
    position: Tensor


class LightNetAttention(nn.Module):
    """`W_o (RMS(lightnet(silu(W_q x), W_k x, W_v x)) * gate(W_b W_a x))`.

    Parameters carry the names of flash-linear-attention's layer, whose output stage is the default:
    a norm over all channels with a weight, then the gate. The first author's code (xmixers) has
    `gate_rank=dim // heads, gate="sigmoid", gate_first=True, initial_mass=1, scale=1.0`.

    Args:
        dim: `C`, channels in and out.
        heads: `H`, divides `dim`.
        gate_rank: rank of the gate.
        axes: of the grid that LRPE encodes; 0 for no positions.
        causal: whether a token sees only those before it.
        initial_mass, scale: as for :func:`regard.linear.lightnet.lightnet_attention`.
        gate: activation of the gate.
        gate_first: gate before the norm, not after it.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        gate_rank: int = 128,
        *,
        axes: int = 0,
        causal: bool = True,
        initial_mass: int = 0,
        scale: float | None = None,
        gate: Literal["silu", "sigmoid"] = "silu",
        gate_first: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"LightNetAttention: heads must divide dim {dim}, got {heads}")
        if gate not in ("silu", "sigmoid"):
            raise ValueError(f"LightNetAttention: gate must be 'silu' or 'sigmoid', got {gate!r}")
        if gate_rank < 1 or axes < 0:
            raise ValueError(
                "LightNetAttention: gate_rank must be >= 1 and axes >= 0, got "
                f"{gate_rank} and {axes}"
            )
        self.heads, self.axes, self.causal = heads, axes, causal
        self.initial_mass, self.scale = initial_mass, scale
        self.gate, self.gate_first = gate, gate_first
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.g_proj = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim, bias=False)
        )
        self.g_norm = nn.RMSNorm(dim, eps=1e-5)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.lrpe = MDLRPE(heads, dim // heads, axes) if axes else None

    def forward(
        self,
        x: Tensor,
        grid: Sequence[int] | None = None,
        state: LayerState | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """`(B, N, C)` to `(B, N, C)`.

        Args:
            x: tokens, on a grid flattened row-major where `axes > 1`.
            grid: sides of the grid, needed for `axes > 1`. A causal call may hold a part of it.
            state: of the tokens before, default none; causal only.
            mask: `(B, N)` bool, True for tokens; padding is skipped and has no place.
            return_state: also return the new :class:`LayerState`.

        Raises:
            ValueError: a grid that does not fit, or a state without causality.
        """
        if not self.causal and (state is not None or return_state):
            raise ValueError("LightNetAttention: causal=False has no state")
        b, n = x.shape[:2]
        seen = x.new_zeros(b, dtype=torch.long) if state is None else state.position
        steps = torch.ones(b, n, dtype=torch.long, device=x.device) if mask is None else mask.long()
        counted = seen[:, None] + steps.cumsum(1)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (F.silu(self.q_proj(x)), self.k_proj(x), self.v_proj(x))
        )
        angles = None
        if self.lrpe is not None:
            index = grid_index((counted - 1).clamp(min=0), self._grid(grid, n))
            angles = self.lrpe.angles(index)
        attend = partial(
            lightnet_attention,
            initial_mass=self.initial_mass,
            scale=self.scale,
            angles=angles,
            mask=mask,
        )
        if not self.causal:
            return self._output(x, attend(q, k, v, causal=False))
        before = None if state is None else state.attention
        out, attention = attend(q, k, v, state=before, return_state=True)
        out = self._output(x, out)
        return (out, LayerState(attention, counted[:, -1] if n else seen)) if return_state else out

    def _grid(self, grid: Sequence[int] | None, n: int) -> tuple[int, ...]:
        if grid is None and self.axes == 1:
            return (max(n, 1),)
        fits = grid is not None and len(grid) == self.axes
        if grid is None or not fits or (not self.causal and math.prod(grid) != n):
            raise ValueError(
                f"LightNetAttention: grid must have {self.axes} axes and hold {n} tokens, got {grid}"
            )
        return tuple(grid)

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        out, gate = out.transpose(1, 2).flatten(2), self.g_proj(x)
        gate = F.silu(gate) if self.gate == "silu" else gate.sigmoid()
        found: Tensor = self.o_proj(
            self.g_norm(out * gate) if self.gate_first else self.g_norm(out) * gate
        )
        return found
