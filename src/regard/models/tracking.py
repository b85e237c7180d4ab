"""Keeps track of forward passes and KV caches: where a pass stands in its sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from .calls import CacheRecord, Pass
from .own_mask import OwnMask
from .spans import Spans


def bound(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, the extra keywords among them."""
    # names of positional arguments; a call that does not fit is the module's own to refuse
    return {**dict(zip(signature.parameters, args, strict=False)), **kwargs}


def given_tokens(given: dict[str, Any]) -> Tensor | None:
    """The model's input among its arguments: ids ``(B, N)`` or embeddings ``(B, N, C)``."""
    for name in ("input_ids", "inputs_embeds"):
        tokens = given.get(name)
        if isinstance(tokens, Tensor):
            return tokens
    return None


class Tracker:
    """The pass that is running, and what is known about each KV cache.

    Args:
        spans: the spans that the owner with this number sees in a pass.
    """

    def __init__(self, spans: Callable[[int, Pass], Spans | None]) -> None:
        self.passing: Pass | None = None
        self._spans = spans
        self._caches: WeakKeyDictionary[Cache, CacheRecord] = WeakKeyDictionary()

    def begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward-pre-hook of the decoder: a new pass starts."""
        given = bound(inspect.signature(root.forward), args, kwargs)
        tokens, cache = given_tokens(given), _cache(given)
        if tokens is None:
            self.passing = None  # not tokens (an image tower): the first attention call tells
            return
        past = 0 if cache is None else int(cache.get_seq_length())
        self.passing = self._start(tokens.shape[1], past, cache)
        self.passing.given_spans = given.get("spans")
        self.moved(given.get("position_ids"))

    def during(self, n: int, own: OwnMask, given: dict[str, Any]) -> Pass:
        """The pass that an attention call with ``n`` queries belongs to."""
        cache = _cache(given)
        if self.passing is None or self.passing.n != n:
            self.passing = self._start(n, own.offset + own.keys - n, cache)
        elif self.passing.record is None and cache is not None:
            self._link(self.passing, cache)
        return self.passing

    def moved(self, position_ids: Tensor | None) -> None:
        """The position ids of the running pass, where the model was given any."""
        passing = self.passing
        if passing is None or position_ids is None:
            return
        passing.position_ids = position_ids
        if passing.record is not None:
            _extend(passing.record, passing)

    def key_positions(self, m: int) -> Tensor:
        """Position ids of the last ``m`` keys, ``(A, B or 1, M)`` on A axes."""
        passing = self.passing
        assert passing is not None
        known = passing.record.positions if passing.record is not None else _positions(passing)
        if known is None or known.shape[-1] < m:
            have = 0 if known is None else known.shape[-1]
            raise ValueError(
                f"call.rotary: the positions of {have} of {m} keys are known; enter the patch "
                "before the KV cache is filled"
            )
        return known[..., known.shape[-1] - m :]

    def fork(self, cache: Cache) -> Cache:
        """A copy of a cache, together with what methods have kept with it."""
        made: dict[int, Any] = {}
        copy = deepcopy(cache, made)
        # a cache may hold others (a second branch's), of which something is known too
        for known, record in list(self._caches.items()):
            twin = made.get(id(known))
            if isinstance(twin, Cache):
                self._caches[twin] = deepcopy(record)
        return copy

    def _start(self, n: int, past: int, cache: Cache | None) -> Pass:
        prompt = n if past == 0 else past + (n if n > 1 else 0)
        passing = Pass(n, past, prompt, self._spans)
        if cache is not None:
            self._link(passing, cache)
        return passing

    def _link(self, passing: Pass, cache: Cache) -> None:
        record = self._caches.get(cache)
        if record is None:
            record = self._caches[cache] = CacheRecord(passing.prompt)
        if passing.past < record.seen:  # cropped or reset: what was kept may describe other tokens
            record.stores.clear()
        if passing.past == 0:
            record.prompt = passing.prompt
        passing.prompt = record.prompt
        passing.record = record
        record.seen = passing.past + passing.n
        _extend(record, passing)


def _positions(passing: Pass) -> Tensor | None:
    """Position ids of a pass's tokens on all axes that the model was given, ``(A, B or 1, N)``."""
    given = passing.position_ids
    if given is None:
        return passing.rows[None, None]
    if given.dim() == 2:
        return given[None]
    return given if given.dim() == 3 else None


def _extend(record: CacheRecord, passing: Pass) -> None:
    """Put the pass's positions behind those of the tokens before it."""
    now, before = _positions(passing), record.positions
    if passing.past == 0 or now is None:
        record.positions = now
    elif before is None or before.shape[-1] < passing.past:
        record.positions = None
    else:
        parts = [before[..., : passing.past].to(now.device), now]
        # one axis stands for all; one more than in the other pass is in front, and counts the tokens
        axes = min((p.shape[0] for p in parts if p.shape[0] > 1), default=1)
        parts = [p[-axes:].expand(axes, -1, -1) for p in parts]
        batch = max(p.shape[1] for p in parts)
        # sequences that were repeated (beams) stand together
        fits = [p.repeat_interleave(batch // p.shape[1], 1) for p in parts]
        record.positions = torch.cat(fits, -1)


def _cache(given: dict[str, Any]) -> Cache | None:
    return next((value for value in given.values() if isinstance(value, Cache)), None)
