"""Attention to pooled groups of old tokens and to recent tokens exactly, in one softmax.

Tokens are cut into groups of `group`. A query at position `p` (0-based) reads one core token for each
of the first

    J(p) = max(0, floor((p + 1 - window) / group))

groups and every key from `J(p) group` to `p` exactly: at least `window` of them once there are so
many, at most `window + group - 1`. This is CCA-Attention's rule (arXiv 2412.12465, section 3.3), and
with `window = 1` the fixed pattern of Combiner (arXiv 2107.05768, section 4.1): the own segment
exactly, all earlier ones as summaries. How a group is pooled is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from regard.core.attend import attend
from regard.core.layout import Index
from regard.core.masks import Mask, Shifted
from regard.core.merge import merge

# (q, k, v) of whole groups, (B, H, C * group, D) and so on -> core keys and core values
Pool: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def check_sizes(name: str, group: int, window: int) -> None:
    """Raise `ValueError` unless `group` and `window` are positive integers."""
    for what, value in (("group", group), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {what} must be an integer >= 1, got {value!r}")


def cores_seen(position: Tensor, group: int, window: int) -> Tensor:
    """`J(p)`, how many core tokens a query at each 0-based position reads."""
    return torch.div(position + 1 - window, group, rounding_mode="floor").clamp(min=0)


@dataclass(frozen=True)
class CoreTokens(Mask):
    """Which core tokens a query reads: `j < J(p)`.

    The keys of the call are core tokens, so its positions say nothing about tokens: the query at
    position `i` is the token `i + ahead`.

    Args:
        group: tokens of a core token.
        window: tokens that a query reads exactly at least, its own among them.
        ahead: tokens so far minus core tokens given.
    """

    group: int
    window: int
    ahead: int

    def __post_init__(self) -> None:
        check_sizes("CoreTokens", self.group, self.window)

    closed = True
    constant = True

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return j < cores_seen(i + self.ahead, self.group, self.window)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        # J never falls from one position to the next
        return self.allows(i1, j0), self.allows(i0, j1)


@dataclass(frozen=True)
class LocalTokens(Mask):
    """Which keys a query reads exactly: `J(i) group <= j <= i`.

    Args:
        group, window: as :class:`CoreTokens`.
    """

    group: int
    window: int

    def __post_init__(self) -> None:
        check_sizes("LocalTokens", self.group, self.window)

    closed = True
    constant = True

    def _first(self, i: Tensor) -> Tensor:
        return cores_seen(i, self.group, self.window) * self.group

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        return (j <= i) & (j >= self._first(i))

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        # Both ends of a row's stretch never fall, so the earliest row that reaches j0 decides.
        row = torch.maximum(i0, j0)
        some = (row <= i1) & (self._first(row) <= j1)
        return some, (j1 <= i0) & (self._first(i1) <= j0)


def attend_cores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    core_k: Tensor,
    core_v: Tensor,
    group: int,
    window: int,
    *,
    start: int = 0,
    scale: float | None = None,
) -> Tensor:
    """One softmax over core tokens and recent keys, as two partial results merged by their lse.

    Args:
        q: `(B, H, N, D)`, the last `N` of all tokens.
        k, v: `(B, Hkv, L, D)` and `(B, Hkv, L, Dv)`, the tokens from position `start` on.
        core_k, core_v: `(B, Hc, C, D)` and `(B, Hc, C, Dv)`; `Hc` divides `H`.
        group, window: as in the module's formula.
        start: position of the first key, not after the first one that a query reads.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`.
    """
    local: Mask = LocalTokens(group, window)
    if start:
        local = Shifted(local, start)
    parts = [attend(q, k, v, mask=local, scale=scale, return_lse=True)]
    cores, tokens = core_k.shape[2], start + k.shape[2]
    if cores and tokens - window >= group:
        mask = CoreTokens(group, window, tokens - cores)
        parts.append(attend(q, core_k, core_v, mask=mask, scale=scale, return_lse=True))
    return merge(parts)[0]


class PooledCache:
    """What decoding needs of one layer: core tokens, the recent keys, the unfinished group's queries.

    A group is pooled as soon as it is complete, when the queries that weigh it are at hand. Of the
    keys only those stay that a later query reads exactly: `M / group + window + group` entries
    instead of `M`.

    Args:
        group, window: as in the module's formula.
        pool: `(q, k, v)` of whole groups to their core keys and core values.
        scale: factor on the scores, default `D ** -0.5`.
    """

    def __init__(self, group: int, window: int, pool: Pool, scale: float | None = None) -> None:
        check_sizes(type(self).__name__, group, window)
        self.group, self.window, self.pool, self.scale = group, window, pool, scale
        self.length = 0
        self._start = 0
        self._open: Tensor | None = None
        self._local: tuple[Tensor, Tensor] | None = None
        self._cores: tuple[Tensor, Tensor] | None = None

    @property
    def entries(self) -> tuple[int, int]:
        """Core tokens and exact keys that are held."""
        cores = 0 if self._cores is None else self._cores[0].shape[2]
        return cores, self.length - self._start

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append `N` tokens and attend from them, `(B, H, N, Dv)`; any `N`, in any steps.

        Args:
            q, k, v: `(B, H, N, D)`, `(B, Hkv, N, D)`, `(B, Hkv, N, Dv)` of the new tokens.

        Raises:
            ValueError: not as many keys as queries.
        """
        if k.shape[2] != q.shape[2]:
            raise ValueError(
                f"{type(self).__name__}: q has {q.shape[2]} tokens, but k has {k.shape[2]}; "
                "expected those of the same new tokens"
            )
        self.length += q.shape[2]
        waiting = _joined(self._open, q)
        k, v = (_joined(old, x) for old, x in zip(self._local or (None, None), (k, v), strict=True))
        whole = waiting.shape[2] // self.group * self.group
        if whole or self._cores is None:
            # The unfinished group's tokens are the last ones of the local keys too.
            first = k.shape[2] - waiting.shape[2]
            new = self.pool(
                waiting[:, :, :whole],
                k[:, :, first : first + whole],
                v[:, :, first : first + whole],
            )
            old = self._cores or (None, None)
            self._cores = _joined(old[0], new[0]), _joined(old[1], new[1])
        out = attend_cores(
            q, k, v, *self._cores, self.group, self.window, start=self._start, scale=self.scale
        )
        # The next query stands at position `length`. What it lets go of has been pooled, since
        # `window >= 1`. Copies, because views would hold on to the whole prompt.
        keep = max(0, (self.length + 1 - self.window) // self.group) * self.group
        gone = keep - self._start
        self._local = k[:, :, gone:].clone(), v[:, :, gone:].clone()
        self._open = waiting[:, :, whole:].clone()
        self._start = keep
        return out


def _joined(old: Any, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=2)
