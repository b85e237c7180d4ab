"""MoA's cache: every head keeps sinks and a ring of its own size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.attend import attend

from .moa_rules import SinkBands


class MoACache:
    """Keys and values of one layer, each key head with its own number of slots.

    The first ``sinks`` tokens stay; of the others a head keeps the last ``span - sinks``, written in
    turn over the oldest. Keys are stored as they come, after the rotary embedding, so that those that
    stay keep their absolute positions. Memory is the sum of the spans.

    Args:
        spans: slots of each key head, the sinks among them (:meth:`MoAPlan.spans`, one layer's row).
        sinks: tokens at the start that stay; one slot fewer than the span where that is short.

    Raises:
        ValueError: no spans, a span below 2, or a negative number of sinks.
    """

    def __init__(self, spans: Sequence[int] | Tensor, sinks: int = 64) -> None:
        self.spans = tuple(int(x) for x in spans)
        if not self.spans or min(self.spans) < 2:
            raise ValueError(f"MoACache: spans must be integers >= 2, got {list(self.spans)}")
        if sinks < 0:
            raise ValueError(f"MoACache: sinks must be an integer >= 0, got {sinks!r}")
        self.sinks = tuple(min(sinks, span - 1) for span in self.spans)
        self.length = 0
        self._k: list[Tensor] = []
        self._v: list[Tensor] = []

    @property
    def slots(self) -> int:
        """Slots of all heads that hold a token."""
        return sum(min(span, self.length) for span in self.spans)

    def keys(self, head: int) -> tuple[Tensor, Tensor]:
        """What a head holds, oldest first: ``(B, 1, S, D)`` and ``(B, 1, S, Dv)``."""
        at = self._order(head)
        return self._k[head][:, :, at], self._v[head][:, :, at]

    def _slots(self, head: int, first: int, last: int) -> Tensor:
        """The slots of positions ``first..last - 1``."""
        sinks, ring = self.sinks[head], self.spans[head] - self.sinks[head]
        place = torch.arange(first, last)
        return torch.where(place < sinks, place, sinks + (place - sinks) % ring)

    def _order(self, head: int) -> Tensor:
        sinks, ring = self.sinks[head], self.spans[head] - self.sinks[head]
        start = max(min(self.length, sinks), self.length - ring)
        kept = self._slots(head, start, self.length)
        return torch.cat([torch.arange(min(sinks, self.length)), kept])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Append the new tokens' keys and values, and let their queries read what they may.

        Args:
            q: ``(B, H, N, D)``.
            k, v: ``(B, Hkv, N, D)`` and ``(B, Hkv, N, Dv)``, one key head for each span.

        Returns:
            ``(B, H, N, Dv)``, what :class:`SinkBands` with bands ``span - sinks`` gives over all tokens.
        """
        hkv, n = k.shape[1:3]
        if hkv != len(self.spans) or q.shape[1] % hkv or q.shape[2] != n:
            raise ValueError(
                f"MoACache: made for {len(self.spans)} key heads, got q {tuple(q.shape)} and "
                f"k {tuple(k.shape)}"
            )
        self._open(k, v)
        parts = []
        for head, queries in enumerate(q.unflatten(1, (hkv, -1)).unbind(1)):
            new = k[:, head : head + 1], v[:, head : head + 1]
            if n == 1:
                # What the new token overwrites is just what it may no longer read.
                self._write(head, *new)
                filled = min(self.length + 1, self.spans[head])
                keys, values = (x[head][:, :, :filled] for x in (self._k, self._v))
                parts.append(attend(queries, keys, values, scale=scale))
                continue
            keys, values = (torch.cat(pair, 2) for pair in zip(self.keys(head), new, strict=True))
            # Dropped keys leave a gap behind the sinks, which changes no distance inside the band.
            band = self.spans[head] - self.sinks[head]
            mask = SinkBands((band,) * queries.shape[1], self.sinks[head])
            parts.append(attend(queries, keys, values, mask=mask, scale=scale))
            self._write(head, *new)
        self.length += n
        return torch.cat(parts, 1)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Append keys and values whose queries were served elsewhere, as after a dense prompt."""
        if k.shape[1] != len(self.spans):
            raise ValueError(
                f"MoACache: made for {len(self.spans)} key heads, got k {tuple(k.shape)}"
            )
        self._open(k, v)
        for head in range(len(self.spans)):
            self._write(head, k[:, head : head + 1], v[:, head : head + 1])
        self.length += k.shape[2]

    def _open(self, k: Tensor, v: Tensor) -> None:
        if not self._k:
            sizes = [(k.shape[0], 1, span) for span in self.spans]
            self._k = [k.new_zeros(*size, k.shape[3]) for size in sizes]
            self._v = [v.new_zeros(*size, v.shape[3]) for size in sizes]

    def _write(self, head: int, k: Tensor, v: Tensor) -> None:
        """Store new tokens: those that are sinks, and the last that fit into the ring."""
        n, end = k.shape[2], self.length + k.shape[2]
        ring = self.spans[head] - self.sinks[head]
        place = torch.arange(self.length, end)
        stays = (place < self.sinks[head]) | (place >= end - ring)
        slots = self._slots(head, self.length, end)[stays]
        self._k[head][:, :, slots] = k[:, :, torch.arange(n)[stays]].detach()
        self._v[head][:, :, slots] = v[:, :, torch.arange(n)[stays]].detach()
