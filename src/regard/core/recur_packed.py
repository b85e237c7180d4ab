"""The recurrence over packed sequences: each from its own state, none padded."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .recur import recur


def recur_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    chunk: int = 64,
    return_state: bool = False,
    backend: str = "auto",
) -> Any:
    """:func:`regard.recur` of each packed sequence. Equally long ones run together.

    Args:
        q, k, v: ``(T, H, K)``, ``(T, Hkv, K)``, ``(T, Hkv, V)``: tokens before heads.
        cu_seqlens: integers ``(S + 1,)``: sequence ``s`` has the tokens ``cu[s] .. cu[s + 1] - 1``.
            Sequences may be empty.
        decay: ``(Hs,)``, ``(T, Hs)`` or ``(T, Hs, K)``.
        beta: ``(T, Hs)``.
        state: ``(S, Hs, K, V)``, default zeros.
        scale, chunk, return_state, backend: as for :func:`regard.recur`.

    Returns:
        ``(T, H, V)``, and with ``return_state`` the states ``(S, Hs, K, V)``.

    Raises:
        ValueError: ``cu_seqlens`` does not rise from 0 to ``T``, or shapes do not fit.
    """
    starts = cu_seqlens.tolist()
    if starts[:1] != [0] or starts[-1] != len(q) or sorted(starts) != starts:
        raise ValueError(
            f"recur_packed: cu_seqlens must rise from 0 to the {len(q)} tokens, got {starts}"
        )
    sequences: dict[int, list[int]] = {}
    for at, (a, z) in enumerate(pairwise(starts)):
        sequences.setdefault(z - a, []).append(at)
    order = [at for same in sequences.values() for at in same]
    outs, lasts, rows = [], [], []
    for length, same in sequences.items():
        first = torch.tensor([starts[at] for at in same], device=q.device)
        index = first[:, None] + torch.arange(length, device=q.device)
        rows.append(index.flatten())

        def heads_first(x: Tensor, index: Tensor = index) -> Tensor:
            return x[index].transpose(1, 2)

        out, last = recur(
            heads_first(q),
            heads_first(k),
            heads_first(v),
            decay=decay if decay is None or decay.dim() == 1 else heads_first(decay),
            beta=None if beta is None else heads_first(beta),
            scale=scale,
            state=None if state is None else state[same],
            chunk=chunk,
            return_state=True,
            backend=backend,
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lasts.append(last)
    if not outs:
        raise ValueError("recur_packed: cu_seqlens holds no sequence")
    row = torch.cat(rows)
    out = torch.cat(outs)[torch.argsort(row)]
    if not return_state:
        return out
    return out, torch.cat(lasts)[torch.argsort(torch.tensor(order, device=q.device))]
