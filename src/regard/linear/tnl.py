"""TransNormerLLM: a decoder built for linear attention.

Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
arXiv 2405.17381 (TransNormerLLM itself: 2307.14995). A block is

    x <- x + GLA(SRMS(x))        [q, k, v, u] = W x,  q and k through SiLU
                                 GLA = W_o (u * SRMS(lightning(q, k, v)))
    x <- x + SGLU(SRMS(x))       SGLU = W_3 (W_1 x * W_2 x), no activation

with `SRMS(x) = x / (|x| / sqrt(C))` over the whole width, and LRPE in the first layer only. Decays
are fixed: the authors report NaN where they learn.

The paper prints the decay `exp(-(8 h / H)(1 - l / L))`; the released model and every checkpoint use
the geometric slopes of :func:`regard.linear.lightning2.decay_slopes`, followed here. The released
decoding keeps its position in a counter of the module; here it is a part of the state. Padding is
skipped, where the released code zeroes values only: outputs are the same for padding before the
first token, the one kind that the released code is used with.

Parameters carry the names of the released checkpoints (OpenNLPLab/TransNormerLLM).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.card import Card
from regard.core.call import compute_dtype

from .lightning2 import decay_slopes, lightning_attention
from .tnl_lrpe import LRPE, lrpe

CARD = Card(
    key="tnl",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    arxiv="2405.17381",
    family="linear",
    entry="regard.linear.tnl:TNLBlock",
    definition="tests/linear/test_tnl.py::test_attention_is_the_equations_written_out",
    oracle="python -m tests.golden tests/golden/data/tnl.npz",
    claim="python -m benchmarks.tnl --only decoding",
    cost="python -m benchmarks.tnl --only growth",
    note="Geometric slopes of the released code, not the paper's printed decay; the language model "
    "is regard.linear.tnl_model:TransNormerLLM.",
)


class TNLState(NamedTuple):
    """What a layer keeps between calls.

    Attributes:
        memory: `(B, H, D, D)`, in a layer with LRPE `(B, H, 2 D, D)`.
        position: integers `(B,)`, tokens seen so far, padding not counted.
    """

    memory: Tensor
    position: Tensor


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, without a weight (arXiv 2307.14995, Eq. 14)."""
    wide = x.to(compute_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class SimpleRMSNorm(nn.Module):
    """:func:`simple_rms_norm` as a module without parameters."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, normalised over its last axis."""
        return simple_rms_norm(x, self.eps)


class SGLU(nn.Module):
    """A gated linear unit without activation, `W_3 (W_1 x * W_2 x)` (arXiv 2307.14995, Eq. 13).

    Args:
        dim: channels in and out.
        glu_dim: channels between.
    """

    def __init__(self, dim: int, glu_dim: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(dim, glu_dim, bias=False)
        self.l2 = nn.Linear(dim, glu_dim, bias=False)
        self.l3 = nn.Linear(glu_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to `(..., dim)`."""
        out: Tensor = self.l3(self.l1(x) * self.l2(x))
        return out


class TNLAttention(nn.Module):
    """Gated linear attention of TransNormerLLM.

    Args:
        dim: `C`, channels in and out.
        heads: `H`, divides `dim`.
        layer, num_layers: place of the layer, which sets its decay
            (:func:`regard.linear.lightning2.decay_slopes`); at least 2 layers.
        use_lrpe: encode positions by LRPE; default: in layer 0 only.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self, dim: int, heads: int, layer: int, num_layers: int, use_lrpe: bool | None = None
    ) -> None:
        super().__init__()
        self.heads, self.slopes = (
            heads,
            _layer_slopes("TNLAttention", dim, heads, layer, num_layers),
        )
        self.qkvu_proj = nn.Linear(dim, 4 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.norm = SimpleRMSNorm()
        use_lrpe = layer == 0 if use_lrpe is None else use_lrpe
        self.lrpe = LRPE(heads, dim // heads) if use_lrpe else None

    def forward(
        self,
        x: Tensor,
        state: TNLState | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """`(B, N, C)` to `(B, N, C)`.

        Args:
            x: `(B, N, C)`.
            state: of the tokens before, default none.
            mask: `(B, N)` bool, True for tokens; padding is skipped.
            return_state: also return the new :class:`TNLState`.
        """
        q, k, v, u = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k = F.silu(q), F.silu(k)
        out, state = mix(q, k, v, self.heads, self.slopes, state, mask, self.lrpe)
        out = self.out_proj(u * self.norm(out))
        return (out, state) if return_state else out


def _layer_slopes(what: str, dim: int, heads: int, layer: int, layers: int) -> tuple[float, ...]:
    """The decay of a layer, as numbers: a buffer would be rounded with the weights."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{what}: heads must divide dim {dim}, got {heads}")
    return tuple(decay_slopes(heads, layer, layers).tolist())


def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    slopes: tuple[float, ...],
    state: TNLState | None = None,
    mask: Tensor | None = None,
    positions: LRPE | None = None,
) -> tuple[Tensor, TNLState]:
    """Lightning attention of activated `(B, N, C)` tensors, heads merged again, and the state."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    b, n = q.shape[0], q.shape[2]
    seen = torch.zeros(b, dtype=torch.long, device=q.device) if state is None else state.position
    steps = torch.ones(b, n, dtype=torch.long, device=q.device) if mask is None else mask.long()
    counted = seen[:, None] + steps.cumsum(1)
    if positions is not None:
        angles = positions(counted - 1)
        q, k = lrpe(q, angles), lrpe(k, angles)
    decay = torch.tensor(slopes, dtype=compute_dtype(q.dtype), device=q.device)
    out, memory = lightning_attention(
        q,
        k,
        v,
        decay,
        mask=mask,
        state=None if state is None else state.memory,
        return_state=True,
    )
    last = counted[:, -1] if n else seen
    return out.transpose(1, 2).flatten(2), TNLState(memory, last)


class TNLBlock(nn.Module):
    """A layer of TransNormerLLM: attention and gated linear unit, each behind a simple RMS norm.

    Args:
        dim, heads, layer, num_layers, use_lrpe: as for :class:`TNLAttention`.
        glu_dim: channels inside the gated linear unit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        glu_dim: int,
        layer: int,
        num_layers: int,
        use_lrpe: bool | None = None,
    ) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = SimpleRMSNorm(), SimpleRMSNorm()
        self.token_mixer = TNLAttention(dim, heads, layer, num_layers, use_lrpe)
        self.channel_mixer = SGLU(dim, glu_dim)

    def forward(
        self,
        x: Tensor,
        state: TNLState | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """`(B, N, C)` to `(B, N, C)`; arguments as for :meth:`TNLAttention.forward`."""
        mixed, state = self.token_mixer(self.token_norm(x), state, mask=mask, return_state=True)
        x = x + mixed
        x = x + self.channel_mixer(self.channel_norm(x))
        return (x, state) if return_state else x


class TNLLowRankGate(nn.Module):
    """The layer of the authors' kernel repository (OpenNLPLab/lightning-attention, example).

    Unlike :class:`TNLAttention` it has separate projections, a SiLU on the values too, a LayerNorm
    with weights, and a low-rank gate `sigmoid(W_b W_a x)` of rank `C / H` after the norm.

    Args:
        dim, heads, layer, num_layers: as for :class:`TNLAttention`.
    """

    def __init__(self, dim: int, heads: int, layer: int, num_layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.slopes = _layer_slopes("TNLLowRankGate", dim, heads, layer, num_layers)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.output_gate = nn.Sequential(
            nn.Linear(dim, dim // heads, bias=False), nn.Linear(dim // heads, dim, bias=False)
        )

    def forward(
        self,
        x: Tensor,
        state: TNLState | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """`(B, N, C)` to `(B, N, C)`; arguments as for :meth:`TNLAttention.forward`."""
        q, k, v = (F.silu(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out, state = mix(q, k, v, self.heads, self.slopes, state, mask)
        out = self.o_proj(self.norm(out) * self.output_gate(x).sigmoid())
        return (out, state) if return_state else out
