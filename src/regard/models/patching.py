"""``regard.patch`` and ``regard.watch``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import Cache

from ..core.masks import Mask
from ..core.select import Selector
from .engine import engine_of
from .method import MaskMethod, Method, Probe
from .select_method import SelectMethod
from .sites import Attention
from .spans import Spans

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def patch(
    model: Model,
    *methods: Method | Mask | Selector,
    layers: Collection[int] | None = None,
    spans: Spans | None = None,
    attention: Attention = "self",
) -> Iterator[Model]:
    """Change a running transformers model for the length of a ``with`` block.

        with regard.patch(model, Causal() & (SlidingWindow(256) | Sinks(4))):
            model.generate(**inputs)

    It acts on the self-attention of the model's text decoder (``model.get_decoder()``), or with
    ``attention="cross"`` on the decoder's cross-attention; pass an encoder or an image tower itself
    to patch that. Leaving the block restores the model exactly,
    also after an exception. Blocks nest: an inner patch sees the model as the outer one left it
    (masks intersect, edits run after the outer's, ``attend`` wraps the outer's). Run ``backward``
    of a checkpointed model inside the block: it runs the layers again.

    Args:
        model: a transformers model that uses the attention interface.
        methods: masks, selectors and :class:`Method` objects, outermost first. ``Full()`` changes
            nothing but sends the attention through :func:`regard.attend`. Masks count positions
            from each sequence's first real token, wherever padding puts it.
        layers: layers to which they apply (default all).
        spans: named parts of the prompt, for methods that work on them.
        attention: ``"self"``, or ``"cross"`` for the attention of an encoder-decoder's decoder to
            its encoder: rows are the decoder's tokens, keys, padding and positions the encoder's.

    Raises:
        ValueError: the model does not use the attention interface, a method does not fit it, or was
            calibrated for a model of another shape (:class:`MadeFor`).
    """
    wanted = [as_method(method) for method in methods]
    if not wanted:
        raise ValueError("patch: no method given; Full() is the one that changes nothing")
    with _on(model, [(method, None) for method in wanted], layers, spans, attention):
        yield model


def as_method(value: object) -> Method:
    """A method from what the user gave: a :class:`Method`, a :class:`regard.Mask` or a selector."""
    if isinstance(value, Mask):
        return MaskMethod(value)
    if isinstance(value, Selector):
        return SelectMethod(value)
    if isinstance(value, Method):
        return value
    raise ValueError(f"patch: expected a Method, a Mask or a Selector, got {type(value).__name__}")


class Seen:
    """What the probes of one :func:`watch` have seen, while it runs and afterwards."""

    def __init__(self, probes: tuple[Probe, ...]) -> None:
        self.probes = probes

    def __getitem__(self, which: int | Probe) -> Any:
        """The result of one probe, by its place or by the probe itself."""
        probe = self.probes[which] if isinstance(which, int) else which
        if not any(probe is one for one in self.probes):
            raise ValueError(f"watch: {type(probe).__name__} is not one of the probes")
        return probe.result()

    def result(self) -> Any:
        """The result of the only probe, or a tuple of all results."""
        results = tuple(probe.result() for probe in self.probes)
        return results[0] if len(results) == 1 else results


@contextmanager
def watch(
    model: nn.Module,
    *probes: Probe,
    layers: Collection[int] | None = None,
    spans: Spans | None = None,
    attention: Attention = "self",
) -> Iterator[Seen]:
    """Read a running transformers model for the length of a ``with`` block; changes nothing.

        with regard.watch(model, StatsProbe([...])) as seen:
            model(**inputs)
        seen.result()

    A probe sees the model with every patch that is on, outside or inside its own block.

    Args:
        model: as for :func:`patch`.
        probes: objects with ``result()`` and ``attention(call, out)`` or ``observers()``.
        layers: layers that are watched (default all).
        spans: named parts of the prompt, for probes that work on them.
        attention: as for :func:`patch`.
    """
    if not probes:
        raise ValueError("watch: no probe given")
    for probe in probes:
        if not isinstance(probe, Probe):
            raise ValueError(f"watch: {type(probe).__name__} is no probe: it has no result()")
    with _on(model, [(None, probe) for probe in probes], layers, spans, attention):
        yield Seen(probes)


def fork(model: nn.Module, cache: Cache) -> Cache:
    """A copy of a KV cache that goes on from the same point, as for several answers to one prompt.

    What patched methods have kept with the cache is copied too, which ``copy.deepcopy`` of the cache
    alone would lose. Call it inside the ``with`` block of the patch.

    Args:
        model: the model that filled the cache.
        cache: a transformers cache; it is left as it is.
    """
    return engine_of(model).tracker.fork(cache)


@contextmanager
def _on(
    model: nn.Module,
    wanted: list[tuple[Method | None, Probe | None]],
    layers: Collection[int] | None,
    spans: Spans | None,
    attention: Attention,
) -> Iterator[None]:
    engine = engine_of(model, attention)
    for method, _ in wanted:
        if method is not None:
            method.check_model(model)
    chosen = None if layers is None else frozenset(layers)
    wrong = sorted(i for i in chosen or () if not 0 <= i < len(engine.layers))
    if wrong:
        raise ValueError(f"patch: layers {wrong}, but the model has {len(engine.layers)}")
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    entries = []
    try:
        for method, probe in wanted:
            entries.append(engine.enter(method, probe, chosen, spans, head))
        yield
    finally:
        for entry in reversed(entries):
            engine.leave(entry)
