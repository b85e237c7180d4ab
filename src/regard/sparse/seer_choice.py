"""From what a SeerAttention gate says of blocks to the blocks that are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.layout import BlockLayout
from ..core.mask import Mask
from ..core.select import block_allowed, choose_blocks, chosen_layout


def gate_choice(
    z: Tensor,
    allowed: Tensor,
    *,
    threshold: float | None = None,
    nz_ratio: float | None = None,
    keep: int | None = None,
    dense_rows: int = 2,
    own: int = 1,
) -> Tensor:
    """The key blocks that a gate's logits choose, bool ``(B, H, nq, nk)``.

    Args:
        z: ``(B, H, nq, nk)`` of :class:`~regard.sparse.seer.SeerGate`.
        allowed: bool, broadcastable to ``z``: blocks with a pair that may be looked at.
        threshold: take blocks whose ``softmax(z)`` is above; negative takes all.
        nz_ratio: take the best ``floor(t nk)`` blocks of a row, at least one, with
            ``t = 1 - sqrt(1 - nz_ratio)``: about this share of the causal blocks.
        keep: take this many. Exactly one of the three must be given.
        dense_rows: last query blocks that read everything.
        own: last allowed blocks of a row that are always among those taken.

    Raises:
        ValueError: none or several rules, or a ratio outside (0, 1].
    """
    given = {"threshold": threshold, "nz_ratio": nz_ratio, "keep": keep}
    rules = [name for name, value in given.items() if value is not None]
    if len(rules) != 1:
        raise ValueError(f"gate_choice: give one of {', '.join(given)}, got {rules or 'none'}")
    allowed = allowed.expand(z.shape)
    if threshold is not None:
        forced = choose_blocks(torch.zeros_like(z), allowed, 0, recent=own)
        chosen = (z.softmax(-1) > threshold) & allowed | forced
    else:
        if nz_ratio is not None:
            if not 0.0 < nz_ratio <= 1.0:
                raise ValueError(f"gate_choice: nz_ratio must lie in (0, 1], got {nz_ratio}")
            keep = max(1, int((1 - math.sqrt(1 - nz_ratio)) * z.shape[-1]))
        assert keep is not None
        if keep < 1:
            raise ValueError(f"gate_choice: keep must be at least 1, got {keep}")
        chosen = choose_blocks(z, allowed, keep, recent=own)
    if dense_rows:
        chosen = torch.cat([chosen[:, :, :-dense_rows], allowed[:, :, -dense_rows:]], dim=2)
    return chosen


def gate_select(
    z: Tensor,
    n: int,
    m: int | None = None,
    *,
    block: int,
    threshold: float | None = None,
    nz_ratio: float | None = None,
    keep: int | None = None,
    dense_rows: int = 2,
    own: bool = True,
    mask: Mask | None = None,
) -> BlockLayout:
    """The layout of the blocks that a gate chooses.

    Args:
        z: ``(B, H, nq, nk)`` of :class:`~regard.sparse.seer.SeerGate`.
        n, m: numbers of queries and keys; ``m`` defaults to ``n``.
        block: tokens a block, the gate's.
        threshold, nz_ratio, keep, dense_rows: as for :func:`gate_choice`.
        own: whether the key blocks in which a query block itself stands are always read.
        mask: where a query may look, ``None`` for causal.
    """
    m = n if m is None else m
    shape = -(-n // block), -(-m // block)
    if z.dim() != 4 or tuple(z.shape[2:]) != shape:
        raise ValueError(
            f"gate_select: z must be (B, H, {shape[0]}, {shape[1]}) for {n} queries and {m} keys "
            f"in blocks of {block}, got {tuple(z.shape)}"
        )
    # Query blocks that do not start where key blocks do stand in two of them.
    stands = 1 if (m - n) % block == 0 else 2
    chosen = gate_choice(
        z,
        block_allowed(mask, n, m, block, z.device),
        threshold=threshold,
        nz_ratio=nz_ratio,
        keep=keep,
        dense_rows=dense_rows,
        own=stands if own else 0,
    )
    return chosen_layout(chosen, n, m, block, mask)
