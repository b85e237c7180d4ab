"""What a way of attending costs in a running model: seconds choosing and attending, pairs read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..core.layout import BlockLayout
from ..core.masks import Causal, Mask
from ..core.select import Selector
from ..models import AttentionCall, Method, Spans, patch
from ..models.method import Inner
from .timing import synchronise

# Block side in which the pairs of a mask without a layout are listed.
_BLOCK = 64


class _Clock(Method):
    """Adds up the seconds of everything below it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: Counter[tuple[int, int, int]] = Counter()

    @property
    def rows(self) -> Counter[int]:
        """Query rows by layer."""
        found: Counter[int] = Counter()
        for (layer, n, _), times in self.calls.items():
            found[layer] += n * times
        return found

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Time the rest of the stack, and count the call."""
        self.calls[call.layer, call.n, call.m] += 1
        synchronise(call.q.device)
        start = time.perf_counter()
        out = inner(call)
        synchronise(call.q.device)
        self.seconds += time.perf_counter() - start
        return out


class _Bottom(_Clock):
    """The clock below the method, which also sees what the method reads in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[Mask | BlockLayout, int, int]] = []
        self.softmax = True

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Note where the call looks, then time it."""
        self.softmax &= call.not_softmax is None
        where = call.mask if call.layout is None else call.layout.under(call.mask)
        self.read.append((where, call.n, call.m))
        return super().attend(call, inner)


class Meter:
    """Patches a model with a method between two clocks."""

    def __init__(self) -> None:
        self._top, self._bottom = _Clock(), _Bottom()

    @contextmanager
    def on(
        self, model: Any, how: Mask | Selector | Method, spans: Spans | None = None
    ) -> Iterator[None]:
        """Patch the model for the length of a ``with`` block, with parts of the prompt if given."""
        # The last patch entered is the first to be asked.
        bottom, method = patch(model, self._bottom), patch(model, how, spans=spans)
        with bottom, method, patch(model, self._top):
            yield

    def reset(self) -> None:
        """Forget seconds and calls."""
        for clock in (self._top, self._bottom):
            clock.seconds = 0.0
            clock.calls.clear()
        self._bottom.read.clear()
        self._bottom.softmax = True

    @property
    def seconds(self) -> float:
        """Seconds in attention, choosing included."""
        return self._top.seconds

    @property
    def choosing(self) -> float:
        """Seconds in the method itself: choosing, merging, moving keys about."""
        return self._top.seconds - self._bottom.seconds

    @property
    def plain(self) -> bool:
        """Whether every call reached the bottom once, with all its rows and the model's own keys, and
        its weights are a plain softmax there, so that statistics of positions mean what they say."""
        return self._top.calls == self._bottom.calls and self._bottom.softmax

    def share(self, *, listed: bool) -> float | None:
        """Pairs read over the pairs of dense causal attention, all calls since :meth:`reset`.

        Several calls of one layer are partitions of the keys and add up. ``None`` where a method
        computed rows in its own way, so that what they read is not known.

        Args:
            listed: count whole blocks as a block-sparse backend computes them, instead of the
                allowed pairs alone.
        """
        rows, reached = self._top.rows, self._bottom.rows
        if not rows or any(reached[layer] < n for layer, n in rows.items()):
            return None
        known: dict[tuple[Mask, int, int], float] = {}
        total = 0.0
        for where, n, keys in self._bottom.read:
            if isinstance(where, Causal):
                total += n * keys - n * (n - 1) / 2
            elif isinstance(where, BlockLayout):
                total += _pairs(where, listed)
            elif where.constant:
                at = (where, n, keys)
                if at not in known:
                    known[at] = _pairs(where.layout(n, keys, _BLOCK), listed)
                total += known[at]
            else:
                total += _pairs(where.layout(n, keys, _BLOCK), listed)
        return total / sum(n * (n + 1) / 2 for n in rows.values())


def _pairs(layout: BlockLayout, listed: bool) -> float:
    """Pairs of one head of one batch entry, on average."""
    count = layout.listed_pairs() if listed else layout.allowed_pairs()
    return count / (layout.index.shape[0] * layout.index.shape[1])
