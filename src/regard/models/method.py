"""What can be patched into a model, and what can watch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.masks import And, Full, Mask
from .calls import AttentionCall, Pass
from .edit import Edit
from .made_for import MadeFor
from .sites import LayerSites

Inner: TypeAlias = Callable[[AttentionCall], Tensor]


@dataclass(frozen=True, eq=False)
class Inside:
    """The model that a method enters, for hooks at parts that are no site.

    Attributes:
        root: the decoder or encoder.
        layers: its layers by index, those of ``patch(layers=...)`` only.
        owner: the engine's number for the method: ``passing().cache_store(owner)`` is its store.
        passing: the forward pass that is running.
    """

    root: nn.Module
    layers: Mapping[int, LayerSites]
    owner: int
    passing: Callable[[], Pass]


class Method:
    """Base of everything that :func:`regard.patch` accepts; a subclass overrides what it needs.

    Usually a dataclass with the paper's knobs. It must keep no state of its own about a running
    sequence: that belongs into ``call.store`` (one forward pass) and ``call.cache_store`` (as long
    as the KV cache). A plain :class:`regard.Mask` is a method too: it narrows the model's mask.
    """

    @property
    def made_for(self) -> MadeFor | None:
        """The model that it was calibrated for, where that is known."""
        return None

    def check_model(self, model: nn.Module) -> None:
        """Raise ``ValueError`` if it was calibrated for a model of another shape. A patch asks this
        first."""
        if self.made_for is not None:
            self.made_for.check(model, type(self).__name__)

    def mask(self, pattern: Mask, call: AttentionCall) -> Mask:
        """The mask to use instead of ``pattern`` (in the call's positions; see ``call.place``).
        Padded keys stay hidden whatever is returned."""
        return pattern

    def edits(self) -> Sequence[Edit]:
        """What to change at the sites of the model. Read once, when the patch is entered."""
        return ()

    def hooks(self, inside: Inside) -> Sequence[RemovableHandle]:
        """Hooks of its own, for what no site reaches (a router, a projection). Asked for once, when
        the patch is entered; removed when it is left. Register all of them or raise with none left."""
        return ()

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """The attention output ``(B, H, N, Dv)``. ``inner`` is the next method of the stack, and at
        the bottom :func:`regard.attend` with the edits of ``logits`` and ``weights``. Hand changed
        calls to it (``inner(call.replace(layout=...))``) rather than calling ``regard.attend``:
        edits of other methods would be lost."""
        return inner(call)


@dataclass(frozen=True, eq=False)
class Calibrated(Method):
    """Base of methods whose heads, layers or directions were found in one model.

    Attributes:
        made_for: that model, as its file says; ``None`` where it is not known, and any model is taken.
    """

    made_for: MadeFor | None = field(default=None, kw_only=True, repr=False, compare=False)


def both(first: Mask, second: Mask) -> Mask:
    """``first & second`` without saying anything twice: ``Causal() & Causal()`` would not be
    recognised by the backend that knows causal attention."""
    parts: list[Mask] = []
    for mask in (first, second):
        for part in mask.parts if isinstance(mask, And) else (mask,):
            if not isinstance(part, Full) and part not in parts:
                parts.append(part)
    if not parts:
        return Full()
    return parts[0] if len(parts) == 1 else And(tuple(parts))


class MaskMethod(Method):
    """A mask as a method: a query sees what the model and the mask both allow."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask

    def mask(self, pattern: Mask, call: AttentionCall) -> Mask:
        """The model's pattern and this mask, which counts from the first real token."""
        return both(pattern, call.place(self._mask))


@runtime_checkable
class Probe(Protocol):
    """Reads a running model through :func:`regard.watch`; changes nothing.

    It may also have ``attention(call, out)``, called after every self-attention of the decoder
    with the final call and its output ``(B, H, N, Dv)``, and ``observers()``, which returns
    :class:`Edit` objects whose functions only read.
    """

    def result(self) -> Any:
        """What was seen."""
        ...
