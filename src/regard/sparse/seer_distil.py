"""How a SeerAttention gate learns: the model's own attention, pooled, and the loss towards it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.call import compute_dtype
from ..core.masks import Causal, Mask
from .seer import SeerGate

# Scores of one strip of query rows: 32 MB of float32.
_STRIP = 1 << 23


@torch.no_grad()
def seer_target(
    q: Tensor,
    k: Tensor,
    block: int,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention pooled by its maximum over blocks, each row divided by its sum (section 3.2).

    Made in strips of query blocks: quadratic time, ``O(strip M + N M / block^2)`` memory.

    Args:
        q, k: ``(B, H, N, D)`` and ``(B, Hkv, M, D)`` after the rotary embedding.
        block: tokens a block.
        mask: where a query may look, by default causal.
        scale: factor on the scores, default ``D ** -0.5``.

    Returns:
        ``(B, H, ceil(N / block), ceil(M / block))`` in float32 (float64 for float64 input). A block
        of rows that sees nothing is 0.
    """
    mask = Causal() if mask is None else mask
    b, h, n, d = q.shape
    m = k.shape[2]
    mask.check(n, m, h, b)
    dtype = compute_dtype(q.dtype)
    scale = d**-0.5 if scale is None else scale
    keys = k.to(dtype).mT.unsqueeze(2)
    head = torch.arange(h, device=q.device).view(1, -1, 1, 1)
    entry = torch.arange(b, device=q.device).view(-1, 1, 1, 1)
    rows = block * max(1, _STRIP // max(1, b * h * m * block))
    strips = [torch.zeros(b, h, 0, -(-m // block), dtype=dtype, device=q.device)]
    for first in range(0, n, rows):
        part = q[:, :, first : first + rows].to(dtype) * scale
        i = torch.arange(first, first + part.shape[2], device=q.device)[:, None] + m - n
        scores = (part.unflatten(1, (k.shape[1], -1)) @ keys).flatten(1, 2)
        seen = mask.allows(i, torch.arange(m, device=q.device), head, entry)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        short = (0, -m % block, 0, -part.shape[2] % block)
        tiles = F.pad(weights, short).unflatten(3, (-1, block)).unflatten(2, (-1, block))
        strips.append(tiles.amax((3, 5)))
    target = torch.cat(strips, dim=2)
    total = target.sum(-1, keepdim=True)
    return target / torch.where(total > 0, total, 1.0)


def seer_loss(z: Tensor, target: Tensor) -> Tensor:
    """Mean over elements of ``target (log target - log softmax(z))``, block rows from ``nq // 4`` on.

    The mean counts all ``nk`` blocks of a row, so that the loss shrinks as ``1 / nk``; the authors
    multiply it by 10.

    Args:
        z, target: ``(B, H, nq, nk)`` of :class:`~regard.sparse.seer.SeerGate` and
            :func:`seer_target`.
    """
    if z.shape != target.shape:
        raise ValueError(f"seer_loss: z is {tuple(z.shape)}, but target {tuple(target.shape)}")
    skip = z.shape[2] // 4
    dtype = compute_dtype(z.dtype)
    log_p = z[:, :, skip:].to(dtype).log_softmax(-1)
    return F.kl_div(log_p, target[:, :, skip:].to(dtype), reduction="none").mean()


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a gate learns from: one sequence in one layer.

    Attributes:
        q, k: ``(B, H, N, D)`` and ``(B, Hkv, N, D)`` before the rotary embedding.
        target: of :func:`seer_target`, ``(B, H, nb, nb)``.
    """

    q: Tensor
    k: Tensor
    target: Tensor


def distil(
    gate: SeerGate,
    lessons: Sequence[Lesson],
    *,
    steps: int = 300,
    lr: float = 1e-3,
    warmup: int = 20,
    loss_scale: float = 10.0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a gate by Adam, one lesson a step in turn, the model's weights untouched.

    Args:
        gate: changed in place.
        lessons: at least one.
        steps: of the optimiser.
        lr: highest learning rate, after ``warmup`` steps; then it falls to 0 along a cosine.
        loss_scale: factor on the loss.
        progress: called with the step and its loss.

    Returns:
        The loss of every step, without ``loss_scale``.
    """
    if not lessons:
        raise ValueError("distil: lessons is empty, expected at least one")
    optimiser = torch.optim.Adam(gate.parameters(), lr=lr)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses = []
    for step in range(steps):
        lesson = lessons[step % len(lessons)]
        loss = seer_loss(gate(lesson.q, lesson.k), lesson.target)
        optimiser.zero_grad()
        (loss * loss_scale).backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step, losses[-1])
    return losses
