"""The seam to transformers: "regard" as an attention implementation and as a mask function.

Both must be registered. With the attention function alone transformers makes no mask at all, and a
decoder silently becomes bidirectional. Our mask function makes no N x N tensor either: it returns a
:class:`MaskToken`, which the models hand through untouched.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .own_mask import OwnMask, own_mask

NAME = "regard"
_INTERNAL = "_attn_implementation_internal"


class MaskToken:
    """What transformers asked for when it wanted a mask; translated when attention needs it.

    It has the ``shape`` and ``ndim`` of the mask that it stands for, because transformers looks at
    them when ``generate`` makes the masks ahead of the forward pass (static caches).
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        # a static cache gives its length as a tensor that it goes on counting in
        self.arguments = {**arguments, "q_offset": int(arguments.get("q_offset", 0))}
        sizes = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        self.shape = torch.Size(int(size) for size in sizes)

    def contiguous(self) -> MaskToken:
        """The token itself: ``generate`` asks for it where it expects a tensor."""
        return self

    @cached_property
    def own(self) -> OwnMask:
        """The model's mask as a regard mask; made once for all layers that share the token."""
        return own_mask(self.arguments)


class Takes(Protocol):
    """An engine that serves the attention calls of some modules."""

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
        ...


# which engine serves an attention module; a module that is not here is served as before the patch
ENGINES: WeakKeyDictionary[nn.Module, Takes] = WeakKeyDictionary()


class _Switched:
    """A config whose implementation is "regard" for now, and what it was."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.before: str | None = getattr(config, _INTERNAL)
        self.users = 0


_SWITCHED: dict[int, _Switched] = {}


def switch_on(config: Any) -> None:
    """Make a transformers config say "regard". Counted: models may share a config."""
    _register()
    entry = _SWITCHED.setdefault(id(config), _Switched(config))
    entry.users += 1
    setattr(config, _INTERNAL, NAME)


def switch_off(config: Any) -> None:
    """Undo one :func:`switch_on`; the last one restores what was there."""
    entry = _SWITCHED[id(config)]
    entry.users -= 1
    if entry.users == 0:
        setattr(config, _INTERNAL, entry.before)
        del _SWITCHED[id(config)]


def attention_configs(root: nn.Module) -> list[Any]:
    """The configs of a model and its parts that use the attention interface, each once."""
    found: dict[int, Any] = {}
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            found[id(module.config)] = module.config
    for module in root.modules():
        config = getattr(module, "config", None)
        if config is not None and "Attention" in type(module).__name__:
            found.setdefault(id(config), config)
    return list(found.values())


def _register() -> None:
    # what follows is Python over Python objects; compiled models break their graph here
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))
    AttentionMaskInterface.register(NAME, _mask)


def _mask(**arguments: Any) -> MaskToken:
    given = arguments.get("attention_mask")
    return given if isinstance(given, MaskToken) else MaskToken(arguments)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskToken | Tensor | None,
    **extra: Any,
) -> tuple[Tensor, Tensor | None]:
    engine = ENGINES.get(module)
    if engine is not None:
        return engine.attention(module, query, key, value, attention_mask, extra)
    return original(module, query, key, value, attention_mask, extra)


def original(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskToken | Tensor | None,
    extra: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The call as the model would make it without regard: for modules that are not patched but
    share a config with one that is, and for cross-attention."""
    switched = _SWITCHED[id(module.config)]
    before = switched.before or "eager"
    if isinstance(mask, MaskToken):
        mask = ALL_MASK_ATTENTION_FUNCTIONS[before](**mask.arguments)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)
    out: tuple[Tensor, Tensor | None] = function(module, q, k, v, mask, **extra)
    return out
