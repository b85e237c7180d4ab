"""The engine of one model: which methods and probes are on, and how a call goes through them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .calls import AttentionCall, Pass
from .compute import compute
from .edit import IN_ATTENTION, Edit, Site
from .given_mask import given_mask
from .hooks import hook_edit
from .interface import (
    ENGINES,
    MaskToken,
    attention_configs,
    switch_off,
    switch_on,
)
from .method import Inner, Inside, Method, Probe
from .rotary import Rotary, find_rotary
from .sites import ATTENTIONS, Attention, LayerSites, find_layers
from .spans import Spans
from .tracking import Tracker, bound


@dataclass(eq=False)
class Entry:
    """One method or probe that is on."""

    number: int
    method: Method | None
    probe: Probe | None
    edits: tuple[Edit, ...]
    layers: frozenset[int] | None
    spans: Spans | None
    handles: list[RemovableHandle] = field(default_factory=list)

    def at(self, layer: int) -> bool:
        """Whether it applies to a layer."""
        return self.layers is None or layer in self.layers


class Engine:
    """Serves every self-attention call of one decoder (or encoder) while something is patched, or
    every cross-attention call of one decoder."""

    def __init__(self, root: nn.Module, layers: list[LayerSites], crosses: bool = False) -> None:
        self.root = root
        self.layers = layers
        self.crosses = crosses
        self.index = {s.core: i for i, s in enumerate(layers) if s.core is not None}
        self.entries: list[Entry] = []
        self.tracker = Tracker(self._spans)
        self._arguments: dict[nn.Module, dict[str, Any]] = {}
        self._configs: list[Any] = []
        self._handles: list[RemovableHandle] = []
        self._count = 0

    # ------------------------------------------------------------------ entering and leaving

    def enter(
        self,
        method: Method | None,
        probe: Probe | None,
        layers: frozenset[int] | None,
        spans: Spans | None,
        head: nn.Module | None,
    ) -> Entry:
        """Switch something on; nothing is left changed when this raises."""
        wanted = method.edits() if method is not None else _observers(probe)
        self._count += 1
        depth = len(self.layers)
        edits = tuple(replace(edit.of_depth(depth), owner=self._count) for edit in wanted)
        entry = Entry(self._count, method, probe, edits, layers, spans)
        first = not self.entries
        try:
            if first:
                self._switch_on()
            for edit in edits:
                entry.handles.extend(self._hook(entry, edit, head))
            if method is not None:
                entry.handles.extend(method.hooks(self._inside(entry)))
        except BaseException:
            _remove(entry.handles)
            if first:
                self._switch_off()
            raise
        self.entries.append(entry)
        return entry

    def _inside(self, entry: Entry) -> Inside:
        def passing() -> Pass:
            if self.tracker.passing is None:
                raise ValueError(f"patch: {type(entry.method).__name__} ran outside of a pass")
            return self.tracker.passing

        layers = {at: sites for at, sites in enumerate(self.layers) if entry.at(at)}
        return Inside(self.root, layers, entry.number, passing)

    def _hook(self, entry: Entry, edit: Edit, head: nn.Module | None) -> list[RemovableHandle]:
        if entry.layers is not None and edit.site not in ("positions", "lm_logits"):
            assert not callable(edit.layers)
            both = entry.layers if edit.layers is None else entry.layers & set(edit.layers)
            edit = replace(edit, layers=both)
        return hook_edit(self.root, self.layers, self.tracker, edit, head)

    def leave(self, entry: Entry) -> None:
        """Switch it off again; the last one restores the model."""
        self.entries.remove(entry)
        _remove(entry.handles)
        if not self.entries:
            self._switch_off()

    def _switch_on(self) -> None:
        for config in attention_configs(self.root):
            switch_on(config)
            self._configs.append(config)
        for core in self.index:
            ENGINES[core] = self
            self._handles.append(
                core.register_forward_pre_hook(self._remember(core), with_kwargs=True)
            )
        self._handles.append(
            self.root.register_forward_pre_hook(self.tracker.begin, with_kwargs=True)
        )

    def _switch_off(self) -> None:
        _remove(self._handles)
        for core in self.index:
            ENGINES.pop(core, None)
        while self._configs:
            switch_off(self._configs.pop())
        self._arguments.clear()
        self.tracker = Tracker(self._spans)

    def _remember(self, core: nn.Module) -> Callable[..., None]:
        signature = inspect.signature(core.forward)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._arguments[core] = bound(signature, args, kwargs)

        return before

    # ------------------------------------------------------------------ one attention call

    def attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: MaskToken | Tensor | None,
        extra: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Output ``(B, N, H, Dv)`` and, if asked for, weights ``(B, H, N, M)``."""
        given = self._arguments.pop(module, {})
        call = self._call(module, q, k, v, mask, extra, given)
        weights: list[Tensor] = []
        if extra.get("output_attentions"):

            def keep(x: Tensor, site: Site) -> Tensor:
                weights.append(x)
                return x

            call = call.edited(Edit("weights", keep, observes=True))
        reached: list[tuple[AttentionCall, Tensor]] = []

        def bottom(last: AttentionCall) -> Tensor:
            reached.append((last, compute(last)))
            return reached[-1][1]

        out = self._chain(call.layer, bottom)(call)
        # A method that only narrows or moves the call leaves one plain call with this very output.
        plain = len(reached) == 1 and reached[0][1] is out
        call = reached[0][0] if plain else replace(call, replaced=True)
        for entry in self.entries:
            watch = getattr(entry.probe, "attention", None)
            if watch is not None and entry.at(call.layer):
                watch(replace(call, owner=entry.number), out)
        seen = torch.cat(weights, 2).to(q.dtype) if weights else None
        return out.transpose(1, 2).contiguous(), seen

    def _spans(self, owner: int, passing: Pass) -> Spans | None:
        """The spans that an entry sees: the model call's, else its own, else an outer patch's."""
        declared = [e.spans for e in self.entries if e.number <= owner][::-1]
        for spans in (passing.given_spans, *declared):
            if spans is not None:
                return spans.within(passing.prompt)
        return None

    def _chain(self, layer: int, inner: Inner) -> Inner:
        """The methods around ``inner`` as functions of a call, the one entered last outermost."""
        for entry in self.entries:
            if entry.method is not None and entry.at(layer):
                inner = self._step(entry, entry.method, inner)
        return inner

    def _step(self, entry: Entry, method: Method, inner: Inner) -> Inner:
        def step(call: AttentionCall) -> Tensor:
            mine = replace(call, owner=entry.number)
            return method.attend(mine, inner)

        return step

    def _call(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: MaskToken | Tensor | None,
        extra: dict[str, Any],
        given: dict[str, Any],
    ) -> AttentionCall:
        for name in ("indices", "block_indices"):
            if extra.get(name) is not None:
                raise ValueError(
                    f"patch: {type(module).__name__} selects its keys itself ({name}); "
                    "regard cannot stand in for that attention"
                )
        extra = dict(extra)
        scale, dropout = extra.pop("scaling", None), extra.pop("dropout", 0.0)
        own, bias = given_mask(module, q, k, mask, extra, self.crosses)
        k, v = k[:, :, : own.keys], v[:, :, : own.keys]
        layer = self.index[module]
        passing = self.tracker.during(q.shape[2], own, given)
        passing.heads[layer] = q.shape[1]
        sinks, softcap = extra.pop("s_aux", None), extra.pop("softcap", None)
        call = AttentionCall(
            module=module,
            layer=layer,
            q=q,
            k=k,
            v=v,
            mask=own.pattern,
            own=own,
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            passing=passing,
            bias=bias,
            dropout=float(dropout or 0.0),
            sinks=sinks,
            softcap=softcap,
            extra=extra,
            crosses=self.crosses,
            find_rotary=None if self.crosses else lambda: self._rotary(module, k, given, passing),
        )
        pattern = own.pattern
        edits: list[Edit] = []
        observers: list[Edit] = []
        for entry in self.entries:
            if not entry.at(layer):
                continue
            if entry.method is not None:
                pattern = entry.method.mask(pattern, replace(call, owner=entry.number))
            here = [e for e in entry.edits if e.site in IN_ATTENTION and e.at_layer(layer)]
            edits.extend(e for e in here if not e.observes)
            observers.extend(e for e in here if e.observes)
        return replace(call, mask=own.padded(pattern), edits=(*edits, *observers))

    def _rotary(self, module: nn.Module, k: Tensor, given: dict[str, Any], passing: Pass) -> Rotary:
        positions = self.tracker.key_positions(k.shape[2])
        embeddings = given.get("position_embeddings")
        return find_rotary(self.root, module, embeddings, positions.to(k.device), passing.n)


def _observers(probe: Probe | None) -> tuple[Edit, ...]:
    observers = getattr(probe, "observers", None)
    wanted = tuple(observers()) if observers is not None else ()
    for edit in wanted:
        if not edit.observes:
            raise ValueError(
                f"watch: {type(probe).__name__} has an observer at {edit.site!r} that would change "
                "the model; make it with Edit(..., observes=True)"
            )
    return wanted


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


_ENGINES: WeakKeyDictionary[nn.Module, dict[str, Engine]] = WeakKeyDictionary()


def engine_of(model: nn.Module, attention: Attention = "self") -> Engine:
    """The engine of a model's decoder, for one kind of attention; made when first asked for.

    Raises:
        ValueError: the model does not go through the attention interface, or has no such attention.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"patch: attention must be 'self' or 'cross', got {attention!r}")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"patch: expected a transformers model, got {type(model).__name__}")
    root = model.get_decoder()
    if not isinstance(root, PreTrainedModel):
        root = model
    engines = _ENGINES.setdefault(root, {})
    if attention not in engines:
        layers = find_layers(root, attention)
        there = any(sites.core is not None for sites in layers)
        if attention == "cross" and not there:
            raise ValueError(
                f"patch: {type(root).__name__} has no cross-attention that regard knows; leave "
                'attention="self"'
            )
        if not root._can_set_attn_implementation() or not there:
            raise ValueError(
                f"patch: {type(root).__name__} does not call its attention through transformers' "
                "attention interface, so there is nothing to patch"
            )
        engines[attention] = Engine(root, layers, attention == "cross")
    return engines[attention]
