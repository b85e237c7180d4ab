"""ALoRA's adapters in a running transformers model, with its padding and its KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..models import saved
from ..models.method import Inside, Method
from ..models.sites import find_layers
from ..models.tracking import bound
from .alora import ALoRA


class ALoRAAdapters(nn.Module, Method):
    """Adapters of a model's linear layers, as a method and as parameters to train.

        method = ALoRAAdapters.of(model, r=8)
        optimizer = torch.optim.AdamW(method.parameters())
        with regard.patch(model, method):
            model(ids, labels=ids).loss.backward()

    Every row is adapted, those of the prompt included. Padding reaches the adapters; no spans are
    needed. Their keys and values lie in the model's KV cache, as layers behind its own, so that what
    is done to the cache (beams, crops, copies) is done to them. Nothing of the model is changed or
    frozen.

    Args:
        adapters: by ``"layer.target"``, ``target`` a linear layer's name in the attention block.

    Attributes:
        names: the keys, in order.
        adapters: the adapters, in their order.

    Raises:
        ValueError: a key of another form; on entering: a model without such a linear layer, or one
            of another size; while running: a KV cache that was filled before, or an attention mask
            that is not ``(B, M)``.
    """

    def __init__(self, adapters: Mapping[str, ALoRA]) -> None:
        super().__init__()
        wrong = [name for name in adapters if not name.partition(".")[0].isdecimal()]
        if wrong:
            raise ValueError(f"ALoRAAdapters: keys must be 'layer.target', got {wrong}")
        self.names = list(adapters)
        self.adapters = nn.ModuleList(adapters.values())

    @classmethod
    def of(
        cls,
        model: Any,
        *,
        targets: Collection[str] = ("q_proj", "v_proj"),
        layers: Collection[int] | None = None,
        r: int = 8,
        heads: int = 2,
        alpha: float = 16.0,
        residual: bool = True,
    ) -> ALoRAAdapters:
        """New adapters, which change nothing yet, of the model's dtype and on its device.

        Args:
            model: a transformers decoder; only its sizes are read, it is not kept.
            targets: names of linear layers inside the attention block.
            layers: which ones (default all).
            r, heads, alpha, residual: see :class:`~regard.steer.alora.ALoRA`.

        Raises:
            ValueError: a layer has no such linear layer.
        """
        found: dict[str, ALoRA] = {}
        for at, sites in enumerate(find_layers(model.get_decoder())):
            for target in targets if layers is None or at in layers else ():
                base = _linear(sites.attn, at, target)
                like, sizes = base.weight, (base.in_features, base.out_features)
                found[f"{at}.{target}"] = ALoRA(
                    *sizes, r, heads, alpha, residual, dtype=like.dtype, device=like.device
                )
        return cls(found)

    def hooks(self, inside: Inside) -> Sequence[RemovableHandle]:
        """One hook at each adapted linear layer, and those that follow padding and cache."""
        depth = len(find_layers(inside.root))
        places: list[tuple[str, ALoRA, nn.Linear]] = []
        cores: dict[nn.Module, None] = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            assert isinstance(adapter, ALoRA)
            layer, _, target = name.partition(".")
            at = int(layer)
            if at >= depth:
                raise ValueError(f"ALoRA: adapter {name!r}, but the model has {depth} layers")
            if at not in inside.layers:
                continue
            sites = inside.layers[at]
            linear = _linear(sites.attn, at, target)
            sizes = adapter.A.in_features, adapter.B.out_features
            if (linear.in_features, linear.out_features) != sizes:
                raise ValueError(
                    f"ALoRA: adapter {name!r} maps {sizes[0]} to {sizes[1]} numbers, the layer "
                    f"{linear.in_features} to {linear.out_features}: it was made for another model"
                )
            assert sites.core is not None
            places.append((name, adapter, linear))
            cores[sites.core] = None
        running = _Running(inside)
        handles = [inside.root.register_forward_pre_hook(running.begin, with_kwargs=True)]
        for core in cores:
            handles.append(core.register_forward_pre_hook(running.meet, with_kwargs=True))
        for name, adapter, linear in places:
            handles.append(linear.register_forward_hook(running.adding(name, adapter)))
        return handles

    def save(self, path: str | Path) -> None:
        """Write the weights (safetensors) and each adapter's options (JSON in its header)."""
        tensors: dict[str, Tensor] = {}
        options: dict[str, dict[str, Any]] = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            options[name] = {key: getattr(adapter, key) for key in _OPTIONS}
            for part, weight in adapter.named_parameters():
                tensors[f"{name}/{part}"] = weight
        saved.write(path, "alora", tensors, options)

    @classmethod
    def load(cls, path: str | Path) -> ALoRAAdapters:
        """Read what :meth:`save` wrote, in its dtype, on the CPU.

        Raises:
            ValueError: another file.
        """
        tensors, every = saved.read(path, "alora", "ALoRAAdapters")
        found: dict[str, ALoRA] = {}
        for name, options in every.items():
            weights = {f"{x}.weight": tensors[f"{name}/{x}.weight"] for x in "AqkvoB"}
            sizes = weights["A.weight"].shape[1], weights["B.weight"].shape[0]
            found[name] = ALoRA(*sizes, **options, dtype=weights["A.weight"].dtype)
            found[name].load_state_dict(weights)
        return cls(found)


_OPTIONS = ("r", "heads", "alpha", "residual")


def _linear(block: nn.Module | None, at: int, target: str) -> nn.Linear:
    found = getattr(block, target, None)
    if not isinstance(found, nn.Linear):
        raise ValueError(f"ALoRA: layer {at} has no linear layer {target!r} in its attention")
    return found


class _Keys(DynamicLayer):
    """Keys and values of one adapter, a layer of the model's KV cache behind the model's own.

    The cache reorders, repeats, crops, resets and copies all of its layers alike.
    """

    def __init__(self, owner: int, name: str) -> None:
        super().__init__()
        self.owner, self.name = owner, name

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values so far, these new ones behind them."""
        found: tuple[Tensor, Tensor] = self.update(k, v)
        return found


class _Running:
    """What the running pass was given: its padding, and the KV cache that the layers are handed."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._mask: Tensor | None = None
        self._cache: Cache | None = None

    def begin(self, root: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward-pre-hook of the decoder."""
        mask = bound(inspect.signature(root.forward), args, kwargs).get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError("ALoRA: attention_mask must be (B, M): padding only")
        self._mask = mask

    def meet(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward-pre-hook of an attention module: a cache that the model has just made shows here
        first, before the projections run."""
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        self._cache = (
            cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        )

    def adding(self, name: str, adapter: ALoRA) -> Callable[..., Tensor]:
        """Forward hook of a linear layer."""

        def add(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            added: Tensor = adapter(args[0], self._keys(name), self._mask)
            return output + added

        return add

    def _keys(self, name: str) -> _Keys | None:
        """The adapter's layer of the running cache, as long as the model's own."""
        cache, owner = self._cache, self._inside.owner
        if cache is None:
            return None
        for kept in reversed(cache.layers):
            if isinstance(kept, _Keys) and (kept.owner, kept.name) == (owner, name):
                break
        else:
            kept = _Keys(owner, name)
            self._reserve(cache)
            cache.layers.append(kept)
        past = self._inside.passing().past
        if kept.get_seq_length() != past:
            raise ValueError(
                f"ALoRA: the KV cache holds {past} tokens, the adapter {kept.get_seq_length()}; enter "
                "the patch before the prompt is read"
            )
        return kept

    def _reserve(self, cache: Cache) -> None:
        """The model's own layers come first, also in a cache that makes them when they are used."""
        depth = len(find_layers(self._inside.root))
        while cache.layer_class_to_replicate is not None and len(cache.layers) < depth:
            cache.layers.append(cache.layer_class_to_replicate())
