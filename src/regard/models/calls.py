"""What a method or a probe is given: one attention call of a running model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.bias import Bias
from ..core.layout import BlockLayout
from ..core.masks import Mask
from .own_mask import OwnMask
from .placed import place
from .spans import Spans

if TYPE_CHECKING:
    from .edit import Edit
    from .rotary import Rotary

Store: TypeAlias = dict[Any, Any]


@dataclass
class CacheRecord:
    """What the engine remembers about one KV cache."""

    prompt: int
    seen: int = 0
    positions: Tensor | None = None
    stores: dict[int, Store] = field(default_factory=dict)


@dataclass
class Pass:
    """One forward pass of a patched model.

    Attributes:
        n: tokens in this pass.
        past: tokens before it (columns that the KV cache has seen).
        prompt: length of the prompt; what follows is generated.
        find_spans: the engine's answer to :meth:`spans`.
        position_ids: what the model was given, ``(B or 1, N)`` or with axes in front, or ``None``.
        given_spans: the ``spans=`` keyword of this very call of the model, or ``None``.
        heads: number of query heads of each layer that has run so far.
        record: what is kept with the KV cache, or ``None`` without one.
        allowed: which keys a decoding step's row sees, by mask, number of keys and device.
        chosen: whether an edit applies to a decoding step's row.
    """

    n: int
    past: int
    prompt: int
    find_spans: Callable[[int, Pass], Spans | None]
    position_ids: Tensor | None = None
    given_spans: Spans | None = None
    heads: dict[int, int] = field(default_factory=dict)
    record: CacheRecord | None = None
    stores: dict[int, Store] = field(default_factory=dict)
    allowed: dict[tuple[Mask, int, torch.device], Tensor] = field(default_factory=dict)
    chosen: dict[Edit, Tensor] = field(default_factory=dict)

    def spans(self, owner: int) -> Spans | None:
        """The named parts of the prompt, as one patched method sees them."""
        return self.find_spans(owner, self)

    def store(self, owner: int) -> Store:
        """The dict of one patched method for this pass."""
        return self.stores.setdefault(owner, {})

    def cache_store(self, owner: int) -> Store:
        """The dict of one patched method that lives as long as the KV cache, or the pass."""
        stores = self.record.stores if self.record is not None else self.stores
        return stores.setdefault(-1 - owner, {})

    @property
    def rows(self) -> Tensor:
        """Columns of this pass's tokens, ``(N,)`` int64."""
        return torch.arange(self.past, self.past + self.n)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call: ``softmax(scale * q k^T + bias, under mask and layout) v``.

    A method changes it with ``call.replace(mask=..., layout=..., k=...)`` and hands it on.

    Attributes:
        module: the attention module of the model.
        layer: its index in the decoder.
        q, k, v: ``(B, H, N, D)``, ``(B, Hkv, M, D)``, ``(B, Hkv, M, Dv)``, after the rotary
            embedding, key heads not repeated.
        mask: effective mask: the model's own, every patched mask, padding; in the call's positions
            (row ``r`` is position ``r + M - N``).
        layout: key blocks to read, or ``None``.
        bias: additive scores, or ``None``.
        scale: factor on ``q k^T``.
        dropout: probability (0 outside training).
        sinks: learned sink logits ``(H,)`` (gpt-oss), or ``None``.
        softcap: bound of the scores by ``c * tanh(s / c)`` (Gemma 2), or ``None``.
        own: the model's own mask in parts (pattern, padding, offsets).
        edits: edits of ``logits`` and ``weights`` that are applied below, in order.
        extra: other keyword arguments that reached the attention function.
        crosses: cross-attention: the keys are another sequence's than the queries.
        replaced: seen by a probe: a patched method made this call's output in its own way, other
            than by handing one changed call on.
        owner: the patched method that holds the call (the engine's number for it).
    """

    module: nn.Module
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    own: OwnMask
    scale: float
    passing: Pass
    layout: BlockLayout | None = None
    bias: Bias | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None
    softcap: float | None = None
    edits: tuple[Edit, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    crosses: bool = False
    replaced: bool = False
    owner: int = 0
    find_rotary: Callable[[], Rotary] | None = None

    def replace(self, **changes: Any) -> AttentionCall:
        """The same call with some fields changed."""
        return replace(self, **changes)

    @property
    def spans(self) -> Spans | None:
        """Named parts of the prompt, or ``None`` if none were declared."""
        return self.passing.spans(self.owner)

    @property
    def store(self) -> Store:
        """The method's own dict for one forward pass; it is shared by the layers."""
        return self.passing.store(self.owner)

    @property
    def cache_store(self) -> Store:
        """The method's own dict that lives as long as the KV cache (one pass without a cache).

        It is emptied when the cache was cropped or reset. Beam search reorders the cache's batch
        entries without telling: keep nothing that differs between beams."""
        return self.passing.cache_store(self.owner)

    @property
    def n(self) -> int:
        """Number of queries."""
        return self.q.shape[2]

    @property
    def m(self) -> int:
        """Number of keys."""
        return self.k.shape[2]

    @property
    def decoding(self) -> bool:
        """Whether tokens came before this pass."""
        return self.passing.past > 0

    @property
    def prompt(self) -> int:
        """Length of the prompt, in columns."""
        return self.passing.prompt

    @property
    def rows(self) -> Tensor:
        """Column of each query among the model's tokens, ``(N,)`` int64, left padding included."""
        if self.crosses:
            return self.passing.rows.to(self.q.device)
        return self.columns[self.m - self.n :]

    @property
    def columns(self) -> Tensor:
        """Column of each key among the model's tokens, ``(M,)`` int64."""
        return torch.arange(self.own.offset, self.own.offset + self.m, device=self.k.device)

    @property
    def positions(self) -> Tensor:
        """Positions of the keys in their sequences, ``(1 or B, M)``: padding does not count."""
        start = self.own.start
        if start is None:
            return self.columns[None]
        start = start[:, None] if start.dim() == 1 else start
        return (self.columns - start).clamp(min=0)

    @property
    def not_softmax(self) -> str | None:
        """Why the weights are not the softmax of ``scale q k^T + bias`` under mask and layout (and
        the sinks), or ``None`` when they are."""
        if any(not edit.observes for edit in self.edits):
            return "has edited logits or weights"
        if self.softcap is not None:
            return "has soft-capped scores"
        return "is computed by a patched method in its own way" if self.replaced else None

    def place(self, mask: Mask) -> Mask:
        """A mask written for the sequence (position 0 is its first real token), in this call's
        positions: shifted for left padding and for caches that dropped their first keys."""
        return place(mask, self.own.start, self.own.offset)

    def edited(self, *edits: Edit) -> AttentionCall:
        """The same call with further edits of ``logits`` or ``weights`` applied after the others."""
        mine = tuple(replace(edit, owner=self.owner) for edit in edits)
        return replace(self, edits=(*self.edits, *mine))

    @property
    def rotary(self) -> Rotary:
        """The model's rotary embedding: ``unrotate``, ``rotate`` and the keys' positions.

        ``key_positions`` is for methods of one axis of positions; ``key_axes`` has all of them.

        Raises:
            ValueError: when the model has none that can be found, or when the patch was entered
                after the cache had been filled, so that the old keys' positions are unknown.
        """
        if self.find_rotary is None:
            raise ValueError("call.rotary: this call has no rotary embedding")
        return self.find_rotary()
