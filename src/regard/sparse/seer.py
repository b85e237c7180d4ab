"""SeerAttention: a small gate, learned beside a frozen model, says which key blocks are worth reading.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276.
Queries and keys before the rotary embedding are pooled over blocks of `b` tokens, queries by their
mean, keys by `[max; min; mean]`. Head by head they are projected to `d_g` channels and rotated to the
position of the block's first token; `z = q̃ k̃ᵀ / sqrt(d_g)`, blocks of the future out, and
`softmax(z)` estimates how much attention each key block deserves (section 3.1). Blocks above a
threshold, or the best share, are attended to exactly
(:func:`~regard.sparse.seer_choice.gate_select`). The gate alone is trained, towards the model's
own attention pooled by its maximum: :mod:`regard.sparse.seer_distil`.

Followed is the authors' code (microsoft/SeerAttention, `seer_attn/prefill_sparse`). Like theirs, this
gate serves prefill; decoding is dense. :class:`regard.sparse.seer_method.Seer` puts gates into a
running model. A difference by choice: a query's own block is always read (`own=False` for theirs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.card import Card
from regard.core.masks import Causal
from regard.core.select import block_allowed

CARD = Card(
    key="seer",
    title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    arxiv="2410.13276",
    family="sparse",
    entry="regard.sparse.seer:SeerGate",
    definition="tests/sparse/test_seer.py::test_gate_is_its_equations",
    oracle="python -m tests.golden tests/golden/data/seer.npz",
    claim="python -m benchmarks.seer --train",
    cost="python -m benchmarks.seer --only growth",
    note="The prefill gate; decoding is dense, as in the paper (its -R gate for decoding is not here).",
)

# What the gate says of blocks in the future.
_FUTURE = -1e9


def pool_blocks(x: Tensor, block: int, *, extremes: bool = False) -> Tensor:
    """Mean of blocks of tokens, or ``[max; min; mean]``; a short last block is pooled as it is.

    Args:
        x: ``(B, H, L, D)``.
        block: tokens a block.
        extremes: whether maximum and minimum come first.

    Returns:
        ``(B, H, ceil(L / block), D or 3 D)``.
    """
    whole = x.shape[2] // block * block
    parts = [x[:, :, :whole].unflatten(2, (whole // block, block))]
    if whole < x.shape[2]:
        parts.append(x[:, :, None, whole:])
    pooled = []
    for part in parts:
        kinds = [part.mean(3)]
        if extremes:
            kinds = [part.amax(3), part.amin(3), *kinds]
        pooled.append(torch.cat(kinds, dim=-1))
    return torch.cat(pooled, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in halves, as Llama's: ``x`` ``(B, H, L, d)``, angles ``(1 or B, L, d)``."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


class SeerGate(nn.Module):
    """The gate of one attention layer (arXiv 2410.13276, section 3.1).

    Args:
        heads, kv_heads, head_dim: of the layer.
        block: ``b``, tokens a block.
        gate_dim: ``d_g``, channels that are compared, even.
        rope_base: base of the rotary embedding, the model's own.
        project_q: whether pooled queries are projected. By default only where ``gate_dim`` is not
            ``head_dim``; without it the keys get one projection for each query head.

    Raises:
        ValueError: a size below 1, heads that do not divide, an odd ``gate_dim``.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        block: int = 64,
        gate_dim: int = 128,
        rope_base: float = 10000.0,
        project_q: bool | None = None,
    ) -> None:
        super().__init__()
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block": block}
        for name, value in (*sizes.items(), ("gate_dim", gate_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SeerGate: {name} must be an integer >= 1, got {value!r}")
        if heads % kv_heads:
            raise ValueError(f"SeerGate: kv_heads {kv_heads} does not divide heads {heads}")
        if gate_dim % 2:
            raise ValueError(f"SeerGate: gate_dim must be even, got {gate_dim}")
        project_q = gate_dim != head_dim if project_q is None else project_q
        if not project_q and gate_dim != head_dim:
            raise ValueError(
                f"SeerGate: project_q=False needs gate_dim = head_dim, got {gate_dim} and {head_dim}"
            )
        self.heads, self.kv_heads, self.head_dim, self.block = heads, kv_heads, head_dim, block
        self.gate_dim, self.rope_base = gate_dim, float(rope_base)
        self.query_weight: nn.Parameter | None = None
        if project_q:
            self.query_weight = nn.Parameter(torch.empty(heads, head_dim, gate_dim))
        keys = kv_heads if project_q else heads
        self.key_weight = nn.Parameter(torch.empty(keys, 3 * head_dim, gate_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance ``1 / inputs``."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def settings(self) -> dict[str, Any]:
        """The arguments that make a gate like this one."""
        names = ("heads", "kv_heads", "head_dim", "block", "gate_dim", "rope_base")
        return {
            **{x: getattr(self, x) for x in names},
            "project_q": self.query_weight is not None,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin`` ``(..., d_g)`` at positions ``(...)``, in float32."""
        step = torch.arange(0, self.gate_dim, 2, device=positions.device, dtype=torch.float32)
        turn = positions[..., None].float() * self.rope_base ** (-step / self.gate_dim)
        turn = torch.cat([turn, turn], dim=-1)
        return turn.cos(), turn.sin()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        positions: tuple[Tensor, Tensor] | None = None,
        *,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits of the block weights.

        Args:
            q: ``(B, H, N, D)`` before the rotary embedding, the last ``N`` of ``M`` tokens.
            k: ``(B, Hkv, M, D)`` before the rotary embedding.
            positions: of the first tokens of query blocks ``(1 or B, nq)`` and of key blocks
                ``(1 or B, nk)``; by default counted from the first key on.
            angles: ``cos`` and ``sin`` ``(1 or B, nk, d_g)`` to use instead for keys, and for
                queries, of which there must be as many.

        Returns:
            ``z`` ``(B, H, nq, nk)``, -1e9 for blocks of the future.
        """
        self._check(q, k)
        n, m, b = q.shape[2], k.shape[2], self.block
        if angles is None:
            if positions is None:
                positions = (
                    torch.arange(m - n, m, b, device=q.device)[None],
                    torch.arange(0, m, b, device=q.device)[None],
                )
            at_q, at_k = self.angles(positions[0]), self.angles(positions[1])
        elif n != m:
            raise ValueError(f"SeerGate: angles need as many queries as keys, got {n} and {m}")
        else:
            at_q = at_k = angles
        queries, keys = pool_blocks(q, b), pool_blocks(k, b, extremes=True)
        group = self.heads // self.kv_heads
        if self.query_weight is not None:
            queries, keys = queries @ self.query_weight, keys @ self.key_weight
        else:
            keys = keys.repeat_interleave(group, 1) @ self.key_weight
        queries, keys = rotate(queries, *at_q), rotate(keys, *at_k)
        queries = queries.unflatten(1, (keys.shape[1], -1))
        z = (queries @ keys.mT.unsqueeze(2)).flatten(1, 2) * self.gate_dim**-0.5
        return z.masked_fill(~block_allowed(Causal(), n, m, b, q.device), _FUTURE)

    def _check(self, q: Tensor, k: Tensor) -> None:
        for name, x, heads in (("q", q, self.heads), ("k", k, self.kv_heads)):
            if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != self.head_dim:
                raise ValueError(
                    f"SeerGate: {name} must be (batch, {heads}, length, {self.head_dim}), "
                    f"got {tuple(x.shape)}"
                )
        if q.shape[2] > k.shape[2]:
            raise ValueError(
                f"SeerGate: needs as many keys as queries at least, got {q.shape[2]} queries and "
                f"{k.shape[2]} keys"
            )


def save_gates(gates: Mapping[int, SeerGate], path: str | Path) -> None:
    """Write gates by layer to a safetensors file, their settings in its header."""
    from safetensors.torch import save_file

    tensors = {
        f"{layer}.{name}": weight.detach().contiguous()
        for layer, gate in gates.items()
        for name, weight in gate.named_parameters()
    }
    settings = {str(layer): gate.settings() for layer, gate in gates.items()}
    save_file(tensors, str(path), metadata={"seer": json.dumps(settings)})


def load_gates(path: str | Path) -> dict[int, SeerGate]:
    """Gates by layer from a file of :func:`save_gates`.

    Raises:
        ValueError: the file holds no gates.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = (file.metadata() or {}).get("seer")
        if header is None:
            raise ValueError(f"load_gates: {path} was not written by save_gates")
        gates = {}
        for layer, settings in json.loads(header).items():
            gate = SeerGate(**settings)
            weights = {name: file.get_tensor(f"{layer}.{name}") for name in gate.state_dict()}
            gate = gate.to(next(iter(weights.values())).dtype)
            gate.load_state_dict(weights)
            gates[int(layer)] = gate
    return gates
