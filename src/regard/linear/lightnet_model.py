"""LightNet's block and model (arXiv 2405.21022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .lightnet_layer import LayerState, LightNetAttention
from .lightnet_pe import MDTPE, TPE


class ModelState(NamedTuple):
    """What a causal model keeps: the filter of its :class:`TPE`, and its layers' states."""

    filter: Tensor
    layers: tuple[LayerState, ...]


class _GLU(nn.Module):
    """`W_3 (silu(W_1 x) * W_2 x)`."""

    def __init__(self, dim: int, glu_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, glu_dim, bias=False)
        self.w2 = nn.Linear(dim, glu_dim, bias=False)
        self.w3 = nn.Linear(glu_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return out


class LightNetBlock(nn.Module):
    """Attention and a gated linear unit, each behind an RMS norm and with a residual connection.

    Args:
        dim, heads, gate_rank, axes, causal: as for :class:`LightNetAttention`.
        glu_dim: channels inside the gated linear unit, default `2 * dim`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        glu_dim: int | None = None,
        gate_rank: int = 128,
        *,
        axes: int = 0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.token_norm = nn.RMSNorm(dim, eps=1e-5)
        self.token_mixer = LightNetAttention(dim, heads, gate_rank, axes=axes, causal=causal)
        self.channel_norm = nn.RMSNorm(dim, eps=1e-5)
        self.channel_mixer = _GLU(dim, 2 * dim if glu_dim is None else glu_dim)

    def forward(
        self,
        x: Tensor,
        grid: Sequence[int] | None = None,
        state: LayerState | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """`(B, N, C)` to `(B, N, C)`; arguments as for :meth:`LightNetAttention.forward`."""
        found = self.token_mixer(
            self.token_norm(x), grid, state, mask=mask, return_state=return_state
        )
        mixed, state = found if return_state else (found, None)
        x = x + mixed
        x = x + self.channel_mixer(self.channel_norm(x))
        return (x, state) if return_state else x


class LightNetModel(nn.Module):
    """TPE, or MD-TPE over a grid, then blocks and a last norm; features in, features out.

    Args:
        dim, layers, heads, glu_dim, gate_rank: sizes.
        axes: of the grid. A causal model runs along one axis.
        causal: whether a token sees only those before it.
        positions: with TPE and LRPE; without them a model that is not causal does not know the
            order of its tokens.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        heads: int,
        glu_dim: int | None = None,
        gate_rank: int = 128,
        *,
        axes: int = 1,
        causal: bool = True,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1 or axes < 1 or (causal and axes != 1):
            raise ValueError(
                "LightNetModel: layers and axes must be >= 1, and causal models have 1 axis, got "
                f"{layers} layers, {axes} axes and causal={causal}"
            )
        if causal and not positions:
            raise ValueError("LightNetModel: a causal model has positions, got positions=False")
        self.causal = causal
        self.tpe: nn.Module | None = None
        if positions:
            self.tpe = TPE(dim, heads) if causal else MDTPE(dim, heads, axes)
        turned = axes if positions else 0
        self.layers = nn.ModuleList(
            LightNetBlock(dim, heads, glu_dim, gate_rank, axes=turned, causal=causal)
            for _ in range(layers)
        )
        self.final_norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(
        self,
        x: Tensor,
        grid: Sequence[int] | None = None,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """`(B, N, C)` to `(B, N, C)`.

        Args:
            x: embedded tokens; on a grid flattened row-major where the model is not causal.
            grid: sides of the grid; not causal only, default `(N,)`.
            state: of the tokens before; causal only.
            mask: `(B, N)` bool, True for tokens; causal only.
            return_state: also return the new :class:`ModelState`.

        Raises:
            ValueError: an argument that this kind of model does not take.
        """
        if self.causal:
            if grid is not None:
                raise ValueError("LightNetModel: a causal model takes no grid")
            return self._stream(x, state, mask, return_state)
        if state is not None or mask is not None or return_state:
            raise ValueError("LightNetModel: causal=False takes no state and no mask")
        sides = (x.shape[1],) if grid is None else grid
        if self.tpe is not None:
            x = self.tpe(x, sides)
        for layer in self.layers:
            x = layer(x, sides if self.tpe is not None else None)
        return self.final_norm(x)

    def _stream(
        self, x: Tensor, state: ModelState | None, mask: Tensor | None, return_state: bool
    ) -> Any:
        assert self.tpe is not None
        before = None if state is None else state.filter
        x, filtered = self.tpe(x, before, mask=mask, return_state=True)
        states = []
        for at, layer in enumerate(self.layers):
            entering = None if state is None else state.layers[at]
            x, after = layer(x, None, entering, mask=mask, return_state=True)
            states.append(after)
        x = self.final_norm(x)
        return (x, ModelState(filtered, tuple(states))) if return_state else x
