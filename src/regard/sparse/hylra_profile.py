"""HyLRA's offline profile: how dense each layer's attention is, and what two layers share.

All functions take the attention mass of chunks of keys, summed over the query heads of a key head,
``(..., S, nb)`` for ``S`` decoding steps (:func:`regard.core.token_select.key_mass` with
``share="kv"``), and the number of chunks of each step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.select import choose_blocks


@dataclass(frozen=True)
class LayerProfile:
    """What was measured on a calibration text.

    Attributes:
        density: ``(L,)``, share of chunks that cover 90 % of the mass, averaged over steps and key
            heads, outliers clipped.
        overlap: ``(L, L)``, share of layer ``j``'s top chunks that are layer ``i``'s too, for
            ``i < j``; averaged over steps, the smallest of all key heads. 1 on the diagonal, else 0.
        chunk, keep, sink, recent, steps: what it was measured with; tokens, and decoding steps.
    """

    density: tuple[float, ...]
    overlap: tuple[tuple[float, ...], ...]
    chunk: int
    keep: int
    sink: int
    recent: int
    steps: int

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LayerProfile:
        """Read a profile that :meth:`save` wrote."""
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = tuple(tuple(row) for row in given["overlap"])
        sizes = {name: int(given[name]) for name in ("chunk", "keep", "sink", "recent", "steps")}
        return cls(tuple(given["density"]), rows, **sizes)


def chunk_density(mass: Tensor, chunks: Tensor, cover: float = 0.9) -> Tensor:
    """Share of a step's chunks that are passed before ``cover`` of its mass is reached.

    That is one chunk less than the usual count: chunks whose cumulative share is at most ``cover``.

    Args:
        mass: ``(..., S, nb)``, non-negative; its scale does not matter.
        chunks: ``(S,)``, how many of the ``nb`` chunks exist in each step.

    Returns:
        float64 ``(..., S)``.
    """
    ranked = mass.double().sort(dim=-1, descending=True).values
    share = (ranked / ranked.sum(-1, keepdim=True)).cumsum(-1)
    real = torch.arange(mass.shape[-1], device=mass.device) < chunks[:, None]
    return ((share <= cover) & real).sum(-1).double() / chunks


def clip_outliers(x: Tensor, dim: int) -> Tensor:
    """``x`` clipped to ``[Q1 - 1.5 IQR, Q3 + 1.5 IQR]`` along ``dim``."""
    q1, q3 = x.quantile(0.25, dim, keepdim=True), x.quantile(0.75, dim, keepdim=True)
    reach = 1.5 * (q3 - q1)
    return x.clamp(q1 - reach, q3 + reach)


def layer_density(density: Tensor) -> Tensor:
    """``(L,)`` from ``(L, Hkv, S)``: outliers among the steps clipped, then means of both."""
    return clip_outliers(density, -1).mean(-1).mean(-1)


def top_chunks(mass: Tensor, chunks: Tensor, keep: int, sinks: int = 0, recent: int = 0) -> Tensor:
    """The ``keep`` chunks with the most mass, forced ones counted, bool ``(B, Hkv, S, nb)``.

    Args:
        mass: ``(B, Hkv, S, nb)``.
        chunks: ``(S,)``, how many chunks exist in each step.
        keep, sinks, recent: chunks; the first ``sinks`` and last ``recent`` are always in.
    """
    real = torch.arange(mass.shape[-1], device=mass.device) < chunks[:, None]
    return choose_blocks(mass, real[None, None], keep, sinks=sinks, recent=recent)


def chunk_overlap(chosen: Tensor) -> Tensor:
    """Mean over the steps of ``|T_i ∩ T_j| / |T_j|`` for layers ``i < j``.

    Args:
        chosen: bool ``(L, Hkv, S, nb)``.

    Returns:
        float64 ``(Hkv, L, L)``, 0 below the diagonal and 1 on it.
    """
    layers, heads, steps, _ = chosen.shape
    total = torch.zeros(heads, layers, layers, dtype=torch.float64, device=chosen.device)
    for step in range(steps):
        t = chosen[:, :, step].transpose(0, 1).double()
        total += (t @ t.mT) / t.sum(-1)[:, None, :].clamp(min=1)
    upper = (total / max(steps, 1)).triu(1)
    return upper + torch.eye(layers, dtype=torch.float64, device=chosen.device)


def merge_heads(overlap: Tensor) -> tuple[tuple[float, ...], ...]:
    """``(L, L)`` from ``(Hkv, L, L)``: the smallest overlap of all key heads."""
    return tuple(tuple(row) for row in overlap.amin(0).tolist())


def make_profile(
    density: Sequence[Tensor],
    chosen: Sequence[Tensor],
    *,
    chunk: int,
    keep: int,
    sink: int,
    recent: int,
) -> LayerProfile:
    """A profile from each layer's ``(Hkv, S)`` densities and ``(Hkv, S, nb)`` top chunks."""
    dense = torch.stack(list(density))
    overlap = merge_heads(chunk_overlap(torch.stack(list(chosen))))
    steps = dense.shape[-1]
    return LayerProfile(
        tuple(layer_density(dense).tolist()), overlap, chunk, keep, sink, recent, steps
    )
