"""One strip of chunks of the recurrence: products inside each chunk, then the states in turn.

``n`` chunks of ``c`` tokens; ``G_i`` is the inclusive sum of log-decays from a chunk's start. Only
differences ``G_i - G_j`` with ``j <= i`` are raised, so that no exponent is positive and no decay,
however strong, overflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .recur_line import Line
from .triangle import unit_lower_inverse

# Side of the squares on the diagonal in which decays of single channels are raised pair by pair.
_SUB = 8


def strip(line: Line, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Output ``(L, G, N, V)`` and the state after the last token, from the state ``(L, K, V)``.

    ``chunk`` divides ``N``.
    """
    n = line.length // chunk
    q = line.q.unflatten(2, (n, chunk)).transpose(1, 2)
    k, v = line.k.unflatten(1, (n, chunk)), line.v.unflatten(1, (n, chunk))
    sums = chunk_sums(line, n, chunk)
    rows = q if line.beta is None else torch.cat([q, k[:, :, None]], dim=2)
    scores = pairs(rows, k, sums, line.channels)
    entering, leaving, carry = q, k, None
    if sums is not None:
        wide = sums if line.channels else sums[..., None]
        entering = q * wide.exp()[:, :, None]
        leaving = k * (wide[:, :, -1:] - wide).exp()
        carry = wide[:, :, -1].exp()[..., None]
    if line.beta is None:
        written, starts, state = v, *_turns(leaving.mT @ v, carry, state)
    else:
        beta = line.beta.unflatten(1, (n, chunk))[..., None]
        reading = k if sums is None else k * wide.exp()
        system = beta * scores[:, :, -1]
        solved = unit_lower_inverse(system) @ (beta * torch.cat([v, reading], dim=-1))
        written, starts, state = _delta_turns(solved, leaving, carry, state)
        scores = scores[:, :, :-1]
    group = q.shape[2]
    inside = scores.flatten(2, 3) @ written
    before = entering.flatten(2, 3) @ starts
    out = (inside + before).unflatten(2, (group, chunk))
    return out.transpose(1, 2).flatten(2, 3), state


def chunk_sums(line: Line, n: int, chunk: int) -> Tensor | None:
    """Inclusive sums of the log-decays, ``(L, n or 1, c)`` or ``(L, n, c, K)``."""
    if line.decay is None:
        return None
    if line.constant:
        count = torch.arange(1, chunk + 1, device=line.decay.device, dtype=line.decay.dtype)
        return line.decay[:, :, None] * count
    sums: Tensor = line.decay.unflatten(1, (n, chunk)).cumsum(2)
    return sums


def pairs(rows: Tensor, k: Tensor, sums: Tensor | None, channels: bool) -> Tensor:
    """Decayed products of rows ``(L, n, R, c, K)`` with keys up to their own, ``(L, n, R, c, c)``."""
    if sums is not None and channels:
        return _channel_pairs(rows, k, sums)
    chunk = k.shape[2]
    products: Tensor = (rows.flatten(2, 3) @ k.mT).unflatten(2, (-1, chunk))
    if sums is None:
        return products.tril_()
    return products * _falling(sums[..., :, None] - sums[..., None, :])[:, :, None]


def _falling(differences: Tensor) -> Tensor:
    """``exp`` of differences ``(..., i, j)``, 0 where ``j > i``."""
    side = differences.shape[-1]
    later = torch.ones(side, side, dtype=torch.bool, device=differences.device).triu(1)
    return differences.masked_fill(later, -torch.inf).exp()


def _channel_pairs(rows: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """As :func:`pairs` where every channel has its own decay.

    Squares on the diagonal are raised pair by pair; left of a square both factors are taken
    relative to the sum before it, which lies between them.
    """
    chunk = k.shape[2]
    bands = []
    for a in range(0, chunk, _SUB):
        z = min(chunk, a + _SUB)
        near = sums[:, :, a:z]
        apart = (near[:, :, :, None] - near[:, :, None]).movedim(-1, 2)
        keys = k[:, :, None, a:z] * _falling(apart).movedim(2, -1)
        parts = [torch.einsum("lnrik,lnijk->lnrij", rows[:, :, :, a:z], keys)]
        if a:
            before = sums[:, :, a - 1 : a]
            left = rows[:, :, :, a:z] * (near - before).exp()[:, :, None]
            right = k[:, :, :a] * (before - sums[:, :, :a]).exp()
            block = (left.flatten(2, 3) @ right.mT).unflatten(2, (-1, z - a))
            parts.insert(0, block)
        bands.append(F.pad(torch.cat(parts, dim=-1), (0, chunk - z)))
    return torch.cat(bands, dim=3)


def _turns(added: Tensor, carry: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk ``(L, n, K, V)``, and the last one."""
    starts = []
    for t, new in enumerate(added.unbind(1)):
        starts.append(state)
        kept = state if carry is None else state * carry[:, t if carry.shape[1] > 1 else 0]
        state = kept + new
    return torch.stack(starts, dim=1), state


def _delta_turns(
    solved: Tensor, leaving: Tensor, carry: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With the delta rule, what is written depends on the state: ``U = U_0 - W S``."""
    starts, written = [], []
    wanted, reading = solved.split([state.shape[-1], state.shape[-2]], dim=-1)
    for t in range(solved.shape[1]):
        starts.append(state)
        u = wanted[:, t] - reading[:, t] @ state
        kept = state if carry is None else state * carry[:, t if carry.shape[1] > 1 else 0]
        state = kept + leaving[:, t].mT @ u
        written.append(u)
    return torch.stack(written, dim=1), torch.stack(starts, dim=1), state
