"""LongHeads' chunks: their features, the choice of them, and attention to them (arXiv 2402.10685).

Scores under the rotary embedding depend on differences of positions. Therefore keys stay where they
are, also in a cache, and each query has a copy a chunk, turned to where it should stand: behind chunk
`c` in slot `s` that is `P - s W + c W`, where `P` is its position behind all of its chunks. Copies that
read one chunk share it (:mod:`regard.core.row_blocks`). The algorithm: :mod:`regard.sparse.longheads`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from regard.core.attend import attend
from regard.core.data_masks import Documents
from regard.core.masks import Causal, Mask, SlidingWindow
from regard.core.merge import merge
from regard.core.row_blocks import attend_row_blocks
from regard.core.select import choose_blocks

# `(x, positions) -> x` rotated, for `x` `(B, H, L, D)` and positions that broadcast to `(B, H, L)`.
Rotate: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Queries whose copies are made at once.
_GROUP = 1024


@dataclass(frozen=True)
class ChunkSelect:
    """Which chunks a query reads.

    Args:
        window: `W`, tokens a chunk.
        length: tokens that a query reads at most, within the trained length.
        start: queries at positions before it read everything.
        remap: place the chunks one behind the other; otherwise they stay at their true distances.

    Raises:
        ValueError: `window` does not divide `length`, fewer than 4 chunks, or `start < length`, where
            there would be fewer chunks than a query reads.
    """

    window: int = 256
    length: int = 4096
    start: int = 4096
    remap: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "length", "start"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"ChunkSelect: {name} must be an integer >= 1, got {value!r}")
        if self.length % self.window or self.chunks < 4:
            raise ValueError(
                f"ChunkSelect: length must be a multiple of window, at least 4 times it, got "
                f"length {self.length} and window {self.window}"
            )
        if self.start < self.length:
            raise ValueError(
                f"ChunkSelect: start must be at least length, got {self.start} and {self.length}"
            )

    @property
    def chunks(self) -> int:
        """`n`, the chunks that make up `length`."""
        return self.length // self.window

    def choose(
        self, q: Tensor, features: Tensor, rows: Tensor, *, exclude_self: bool = False
    ) -> Tensor:
        """The complete chunks of each query, ascending, int64 `(B, H, N, n - 1)`.

        Of equal scores the earlier chunk wins.

        Args:
            q: unrotated queries `(B, H, N, D)`.
            features: `(B, H, g, D)` of the first `g` chunks; the later ones of them, which are not
                complete for a query, do not count.
            rows: positions of the queries, `(N,)`, all at least `start`.
            exclude_self: the query does not count among the tokens that it sees.
        """
        complete = (rows + (0 if exclude_self else 1)) // self.window
        at = torch.arange(features.shape[2], device=q.device)
        allowed = (at < complete[:, None])[None, None]
        scores = q @ features.mT
        chosen = choose_blocks(scores, allowed, self.chunks - 1, sinks=1, recent=1)
        return chosen.nonzero()[:, -1].view(*chosen.shape[:-1], self.chunks - 1)

    def stand(self, rows: Tensor, *, exclude_self: bool = False) -> Tensor:
        """`P`, the position of each query behind its chunks, `(N,)`."""
        itself = 0 if exclude_self else 1
        return (self.chunks - 1) * self.window + (rows + itself) % self.window - itself


def chunk_features(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Features of complete chunks.

    Args:
        q: `(B, H, g, W, D)`, rotated to the positions `0 .. W - 1`.
        k, v: `(B, Hkv, g, W, D)`, keys rotated alike.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, g, D)`.

    Raises:
        ValueError: values of another width than keys: mean outputs are compared with keys.
    """
    if v.shape[-1] != k.shape[-1]:
        raise ValueError(f"LongHeads: v has width {v.shape[-1]}, expected that of k, {k.shape[-1]}")
    batch, chunks = q.shape[0], q.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    mean = attend(q, k, v, scale=scale).mean(2, keepdim=True)
    features: Tensor = attend(mean, k, k, scale=scale)
    return features[:, :, 0].unflatten(0, (batch, chunks)).transpose(1, 2)


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    select: ChunkSelect,
    rotate: Rotate,
    *,
    exclude_self: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of the last `N` of `M` tokens to their chunks.

    Args:
        q: `(B, H, N, D)`, before the rotary embedding.
        k: `(B, Hkv, M, D)`, rotated to its true positions `0 .. M - 1`, as caches hold it.
        v: `(B, Hkv, M, Dv)`.
        features: `(B, H, g, D)` of the `M // W` complete chunks.
        rotate: the model's rotary embedding.
        exclude_self: queries from `start` on do not see themselves, as in the authors' prefill.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`.
    """
    n, m = q.shape[2], k.shape[2]
    rows = torch.arange(m - n, m, device=q.device)
    dense = min(n, max(0, select.start - (m - n)))
    parts = []
    if dense:
        end = m - n + dense
        turned = rotate(q[:, :, :dense], rows[:dense])
        parts.append(attend(turned, k[:, :, :end], v[:, :, :end], mask=Causal(), scale=scale))
    for first in range(dense, n, _GROUP):
        here = slice(first, min(n, first + _GROUP))
        own = _running(q[:, :, here], k, v, rows[here], select, rotate, exclude_self, scale)
        others = _complete(
            q[:, :, here], k, v, features, rows[here], select, rotate, exclude_self, scale
        )
        parts.append(merge([own, *others])[0])
    return torch.cat(parts, 2) if parts else v.new_zeros(*q.shape[:3], v.shape[3])


def _running(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    select: ChunkSelect,
    rotate: Rotate,
    exclude_self: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The part of a query's own chunk up to itself, where true distances hold anyway."""
    first, end = int(rows[0]) // select.window * select.window, int(rows[-1]) + 1
    chunk = torch.arange(end - first, device=q.device) // select.window
    mask: Mask = Causal() & Documents(chunk)
    if exclude_self:
        mask = mask & ~SlidingWindow(0)
    near = (x[:, :, first:end] for x in (k, v))
    out, lse = attend(rotate(q, rows), *near, mask=mask, scale=scale, return_lse=True)
    return out, lse


def _complete(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    rows: Tensor,
    select: ChunkSelect,
    rotate: Rotate,
    exclude_self: bool,
    scale: float | None,
) -> list[tuple[Tensor, Tensor]]:
    """One part for each slot of complete chunks; a query's own chunk is left to :func:`_running`."""
    choice = select.choose(q, features, rows, exclude_self=exclude_self)
    slot = torch.arange(select.chunks - 1, device=q.device)
    stand = rows[:, None]
    if select.remap:
        stand = select.stand(rows, exclude_self=exclude_self)[:, None] - slot * select.window
        stand = stand + choice * select.window
    copies = q[:, :, :, None].expand(*choice.shape, -1).flatten(2, 3)
    turned = rotate(copies, stand.expand(choice.shape).flatten(2, 3))
    choice = torch.where(choice == rows[:, None] // select.window, -1, choice)
    out, lse = attend_row_blocks(turned, k, v, choice.flatten(2, 3), select.window, scale=scale)
    out, lse = out.unflatten(2, choice.shape[2:]), lse.unflatten(2, choice.shape[2:])
    return list(zip(out.unbind(3), lse.unbind(3), strict=True))
