"""ALoRA: attention inside the low-rank path, so that an adapter reads the tokens before its own.

Liu et al., "More Than Catastrophic Forgetting: Integrating General Capabilities For Domain-Specific
LLMs", arXiv 2405.17830. (Not "activated LoRA", which is also called aLoRA.)

Only the abstract could be read, which says that a multi-head attention in the low-rank path lets the
adapter use information of preceding tokens. The formula here is a reconstruction:

    y_t = W x_t + alpha / r  B (u_t + W_o MHA(u)_t),   u = A x,

with causal attention of ``heads`` heads over the ``r`` numbers ``u``, and ``B = 0`` at first.
``residual=False`` leaves the ``u_t`` of plain LoRA out. It cannot be merged into ``W``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from regard.card import Card

from ..core.attend import attend
from ..core.data_masks import Keys
from ..core.mask import Mask
from ..core.masks import Causal

CARD = Card(
    key="alora",
    title="More Than Catastrophic Forgetting: Integrating General Capabilities For Domain-Specific LLMs",
    arxiv="2405.17830",
    family="steer",
    entry="regard.steer.alora_model:ALoRAAdapters",
    definition="tests/steer/test_alora.py::test_is_the_formula_written_out",
    oracle="tests/steer/test_alora.py::test_is_torchs_attention_in_the_low_rank",
    claim="python -m benchmarks.alora --only copying",
    cost="python -m benchmarks.alora --only growth",
    note="UNVERIFIED: the formula is a reconstruction from the abstract, `residual` an option of it. "
    "The adapters' keys live in the model's KV cache, so that beams, crops and copies need no care.",
)


class Keeps(Protocol):
    """A store of one adapter's keys and values."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values so far ``(B, h, M, r / h)``, these new ones behind them."""
        ...


@dataclass
class ALoRACache:
    """Keys and values ``(B, h, M, r / h)`` of one adapter and one running sequence."""

    k: Tensor | None = None
    v: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values so far, these new ones behind them."""
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        return k, v

    def crop(self, length: int) -> None:
        """Forget what came after the first ``length`` tokens."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]


class ALoRA(nn.Module):
    """The adapter of a linear layer: what it adds to the layer's output.

    Args:
        in_features, out_features: of the layer.
        r: rank.
        heads: of the attention over ``u``, a divisor of ``r``.
        alpha: the adapter's factor is ``alpha / r``.
        residual: whether ``u`` itself goes into ``B``, as in LoRA.
        dtype, device: of its weights.

    Shapes:
        x ``(B, N, C)`` to ``(B, N, C')``; O(N^2 r).

    Raises:
        ValueError: ``heads`` does not divide ``r``; while running: ``x`` or ``attention_mask`` of
            other axes or lengths.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        heads: int = 2,
        alpha: float = 16.0,
        residual: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if r < 1 or heads < 1 or r % heads:
            raise ValueError(f"{type(self).__name__}: heads {heads} must divide the rank r={r}")
        self.r, self.heads, self.alpha, self.residual = r, heads, alpha, residual
        self.A, self.q, self.k, self.v, self.o = (
            nn.Linear(size, r, bias=False, dtype=dtype, device=device)
            for size in (in_features, r, r, r, r)
        )
        self.B = nn.Linear(r, out_features, bias=False, dtype=dtype, device=device)
        nn.init.zeros_(self.B.weight)

    def forward(
        self, x: Tensor, cache: Keeps | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """What is added for the layer's input.

        Args:
            x: ``(B, N, C)``; with a cache the tokens behind those that it holds.
            cache: keeps this sequence's keys and values; it is extended.
            attention_mask: ``(B, M)``, 0 or ``False`` for padding among all tokens so far. A padded
                row's adapter reads nothing.
        """
        if x.dim() != 3:
            raise ValueError(f"{type(self).__name__}: x must be (B, N, C), got {tuple(x.shape)}")
        u = self.A(x)
        q, k, v = (
            part(u).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        read = self.o(attend(q, k, v, mask=_mask(attention_mask, k)).transpose(1, 2).flatten(2))
        added: Tensor = self.alpha / self.r * self.B(read + u if self.residual else read)
        return added


class ALoRALinear(ALoRA):
    """A linear layer with an adapter that attends.

    Args:
        base: the layer to adapt; its parameters are frozen, and shared, not copied.
        r, heads, alpha, residual: see :class:`ALoRA`.

    Shapes:
        x ``(B, N, C)`` to ``(B, N, C')``; O(N^2 r) beside the base's own cost.

    Raises:
        ValueError: as for :class:`ALoRA`.
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int = 8,
        heads: int = 2,
        alpha: float = 16.0,
        residual: bool = True,
    ) -> None:
        like = base.weight
        sizes = base.in_features, base.out_features
        super().__init__(*sizes, r, heads, alpha, residual, dtype=like.dtype, device=like.device)
        self.base = base.requires_grad_(False)

    def forward(
        self, x: Tensor, cache: Keeps | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The layer's output and the adapter's; arguments as for :meth:`ALoRA.forward`."""
        added = super().forward(x, cache, attention_mask)
        out: Tensor = self.base(x) + added
        return out

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained: everything but the base."""
        return [p for name, p in self.named_parameters() if not name.startswith("base.")]


def _mask(attention_mask: Tensor | None, k: Tensor) -> Mask:
    if attention_mask is None:
        return Causal()
    batch, m = k.shape[0], k.shape[2]
    if attention_mask.shape != (batch, m):
        raise ValueError(
            f"ALoRA: attention_mask must be ({batch}, {m}), all tokens so far, got "
            f"{tuple(attention_mask.shape)}"
        )
    return Causal() & Keys(attention_mask.bool())
