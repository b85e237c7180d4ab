"""CCA-Attention in a running decoder: `with regard.patch(model, CCA()):`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.layout import Index
from regard.core.mask import MaskAround
from regard.core.masks import Causal, Mask, SlidingWindow
from regard.models.calls import AttentionCall
from regard.models.method import Inner, Method

from .cca import POOLS, pool_groups
from .cca_parts import LocalTokens, check_sizes, cores_seen


@dataclass(frozen=True)
class CCA(Method):
    """CCA-Attention (arXiv 2412.12465) instead of a decoder's causal attention.

    Prefill and decoding agree, with left padding too: groups are counted from each sequence's first
    token. Core tokens are kept with the KV cache and made once. The model's cache still holds every
    key, since it is the model's; :class:`~regard.sparse.cca.CCACache` is the one that saves memory.
    Layers that have a sliding window of their own are left as they are.

    Args:
        group, window, pool: as :func:`~regard.sparse.cca.cca_attention`.

    Raises:
        ValueError: a size below 1 or an unknown `pool`; when running, attention that is not causal
            or has a bias or a layout, a patch entered after the cache was filled, or a cache whose
            entries changed places (beam search).
    """

    group: int = 16
    window: int = 1024
    pool: str = "cca"

    def __post_init__(self) -> None:
        check_sizes("CCA", self.group, self.window)
        if self.pool not in POOLS:
            raise ValueError(f"CCA: pool must be one of {', '.join(POOLS)}, got {self.pool!r}")

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """One softmax over core tokens and recent keys, handed on as one call with fewer keys."""
        pattern, start = call.own.pattern, call.own.start
        if any(isinstance(part, SlidingWindow) for part in getattr(pattern, "parts", (pattern,))):
            return inner(call)
        if pattern != Causal() or (start is not None and start.dim() == 2):
            raise ValueError(f"CCA: needs plain causal attention, the model has {pattern!r}")
        if call.bias is not None or call.layout is not None:
            what = "a bias" if call.bias is not None else "a layout"
            raise ValueError(f"CCA: cannot be combined with {what} on the attention")
        if start is None:
            start = torch.zeros(1, dtype=torch.int64)
        start = start.to(call.k.device)
        kept: _Kept = call.cache_store.setdefault(call.layer, _Kept())
        core_k, core_v = kept.update(call, start, self)
        seen = cores_seen(call.m - 1 - start, self.group, self.window)
        core_k, core_v = (x[:, :, : _largest(seen)] for x in (core_k, core_v))
        # Keys before those that the first query reads exactly are not even copied.
        first = start + cores_seen(call.m - call.n - start, self.group, self.window) * self.group
        skipped = -_largest(-first)
        times = core_k.shape[1] // call.k.shape[1]
        k, v = (
            torch.cat([core, x[:, :, skipped:].repeat_interleave(times, dim=1)], dim=2)
            for core, x in ((core_k, call.k), (core_v, call.v))
        )
        local = call.mask & call.place(LocalTokens(self.group, self.window))
        mask = CoresAndLocal(local, start, self.group, self.window, core_k.shape[2], skipped)
        return inner(call.replace(k=k, v=v, mask=mask))


def _largest(x: Tensor) -> int:
    return int(x.max()) if x.numel() else 0


class _Kept:
    """Core tokens of one layer, kept with the KV cache."""

    def __init__(self) -> None:
        self.tokens = 0
        self.cores: tuple[Tensor, Tensor] | None = None
        self._trace: Tensor | None = None

    def update(self, call: AttentionCall, start: Tensor, method: CCA) -> tuple[Tensor, Tensor]:
        """Core keys and values of all groups; those that this call completed are pooled.

        A group's last token is in the call that completes it, so its query is at hand. Sequences
        with different padding complete their groups at different steps.
        """
        self._check(call)
        size, past = method.group, self.tokens
        before, now = ((x - start).clamp(min=0) // size for x in (past, call.m))
        group = before[:, None] + torch.arange(_largest(now - before), device=start.device)
        new = group < now[:, None]
        if self.cores is None or bool(new.any()):
            begin = start[:, None] + group * size
            tokens = (begin[..., None] + torch.arange(size, device=start.device)).flatten(1)
            k, v = (_columns(x, tokens) for x in (call.k, call.v))
            last = _columns(call.q, begin + size - 1 - past)
            pooled = pool_groups(last, k, v, size, method.pool, call.scale)
            self.cores = pooled if self.cores is None else self._placed(pooled, group, new)
        self.tokens = call.m
        return self.cores

    def _placed(
        self, pooled: tuple[Tensor, Tensor], group: Tensor, new: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The cores with `pooled` written where `new`, at `group`, both `(1 or B, w)`."""
        assert self.cores is not None
        wanted = max(self.cores[0].shape[2], _largest(group[new]) + 1)
        found = []
        for old, add in zip(self.cores, pooled, strict=True):
            whole = F.pad(old, (0, 0, 0, wanted - old.shape[2])).transpose(1, 2)
            entry, slot = new.expand(old.shape[0], -1).nonzero(as_tuple=True)
            at = group.expand(old.shape[0], -1)[entry, slot]
            put = whole.index_put((entry, at), add.transpose(1, 2)[entry, slot])
            found.append(put.transpose(1, 2))
        return found[0], found[1]

    def _check(self, call: AttentionCall) -> None:
        """Raise unless the keys before this call are those that were pooled here."""
        past = call.m - call.n
        if self.tokens != past:
            raise ValueError(
                f"CCA: the KV cache holds {past} tokens, but {self.tokens} were seen; enter the "
                "patch before the cache is filled, and do not crop it"
            )
        # Beams differ in what was generated only: one channel of those keys tells them apart.
        trace = call.k[:, 0, call.prompt :, 0]
        done = 0 if self._trace is None else self._trace.shape[1]
        if self._trace is not None and not torch.equal(trace[:, :done], self._trace):
            raise ValueError(
                "CCA: the KV cache's entries are not those that were pooled; beam search, which "
                "reorders them, is not supported"
            )
        self._trace = trace.detach().clone()


def _columns(x: Tensor, column: Tensor) -> Tensor:
    """`x[:, :, column]` for `(1 or B, T)`; columns beyond the axis, which nobody reads, repeat its
    ends."""
    column = column.clamp(0, max(x.shape[2] - 1, 0))
    if column.shape[0] == 1:
        return x[:, :, column[0]]
    return x.take_along_dim(column[:, None, :, None], dim=2)


@dataclass(frozen=True, eq=False)
class CoresAndLocal(MaskAround):
    """Core tokens first, then a call's keys from one position on.

    Args:
        local: which of the call's keys a query reads exactly, in the call's positions.
        start: position of each sequence's first token, `(1 or B,)`.
        group, window: as :class:`CCA`.
        cores: core tokens in front.
        skipped: keys of the call that were left out.
    """

    local: Mask
    start: Tensor
    group: int
    window: int
    cores: int
    skipped: int

    @property
    def inner(self) -> Mask:
        return self.local

    @property
    def batch(self) -> int | None:
        return self.start.shape[0] if self.start.shape[0] > 1 else self.local.batch

    relative = False
    constant = False

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        self.local.check(n, m - self.cores + self.skipped, heads, batch)

    def _seen(self, i: Tensor, b: Index) -> Tensor:
        """Core tokens that the query at call position `i` reads."""
        start = self.start.to(i.device)
        first = start[b] if self.start.shape[0] > 1 else start[0]
        return cores_seen(i - first, self.group, self.window)

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        by = self.skipped - self.cores
        exact = self.local.allows(i + by, (j + by).clamp(min=0), h, b)
        return torch.where(j < self.cores, j < self._seen(i + by, b), exact)

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        by, end = self.skipped - self.cores, self.cores
        has_cores, has_local = j0 < end, j1 >= end
        some, every = self.local.tile(i0 + by, i1 + by, j0.clamp(min=end) + by, j1 + by, h, b)
        core_some = j0 < self._seen(i1 + by, b)
        core_every = j1.clamp(max=end - 1) < self._seen(i0 + by, b)
        return (
            (has_cores & core_some) | (has_local & some),
            (~has_cores | core_every) & (~has_local | every),
        )
