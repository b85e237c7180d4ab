"""AGLA's second branch: a further forward pass after each of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..models.method import Inside


class SecondBranch:
    """Forward hook of a language model: mixes the logits of the same answer to another prompt in.

    Args:
        inside: the decoder that is patched.
        prompt: keyword arguments of the model for the other prompt.
        mix: from the model's logits and the branch's ``(B, R, V)`` to the new ones.
    """

    def __init__(
        self, inside: Inside, prompt: Mapping[str, Any], mix: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._inside, self._prompt, self._mix = inside, prompt, mix
        self._running = False

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._running:  # this is the second branch's own pass
            return output
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise ValueError(
                "AGLA: the second branch follows the KV cache; run the model with use_cache=True"
            )
        self._running = True
        try:
            with _own_deltas(model):
                logits = self._advance(model, args, kwargs, output, cache)
        finally:
            self._running = False
        rows = min(logits.shape[1], output.logits.shape[1])
        before, last = output.logits[:, :-rows], output.logits[:, -rows:]
        mixed = self._mix(last, logits[:, -rows:].to(last))
        output.logits = torch.cat([before, mixed], 1)
        return output

    def _advance(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        cache: Cache,
    ) -> Tensor:
        """The branch's logits ``(B, R, V)``: of its prompt's last row, or of the pass's rows."""
        owner = self._inside.owner
        found = (x for x in cache.layers if isinstance(x, _Branch) and x.owner == owner)
        branch = next(found, None)
        given = args[0] if args else kwargs.get("input_ids")
        if branch is not None and branch.cache is not None:
            if given is None:
                raise ValueError("AGLA: give the chosen tokens as input_ids")
            return branch.step(model, given)
        embeds = given if given is not None else kwargs["inputs_embeds"]
        past = int(cache.get_seq_length()) - embeds.shape[1]
        if past > 0:
            raise ValueError(
                f"AGLA: the KV cache holds {past} tokens that the second branch has not seen; enter the "
                "patch before the prompt is read"
            )
        if branch is None:
            branch = _Branch(owner)
            cache.layers.append(branch)
        return branch.read(model, self._inside.root, self._prompt, output.logits.shape[0])


class _Branch(DynamicLayer):
    """The second branch's KV cache as a layer of the first one's, behind the model's own: it is
    reordered, repeated, cropped, reset and copied with them."""

    supports_early_init = False

    def __init__(self, owner: int) -> None:
        super().__init__()
        self.owner = owner
        self.cache: Any = None
        self.mask: Tensor = torch.empty(0)
        self.last: Tensor | None = None

    def read(
        self, model: nn.Module, root: nn.Module, prompt: Mapping[str, Any], batch: int
    ) -> Tensor:
        """The prompt's last logits; the positions that the decoder is given (images) are kept."""
        ids = prompt["input_ids"]
        if batch % ids.shape[0]:
            raise ValueError(f"AGLA: masked holds {ids.shape[0]} sequences, the model runs {batch}")
        if batch > ids.shape[0]:
            # As generate does it: models with images in one row of patches have a way of their own.
            expand: Any = model._expand_inputs_for_generation
            rest = {name: value for name, value in prompt.items() if name != "input_ids"}
            ids, rest = expand(expand_size=batch // ids.shape[0], input_ids=ids, **rest)
            prompt = {"input_ids": ids, **rest}
        mask = prompt.get("attention_mask")
        self.last = None

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            places = kwargs.get("position_ids")
            self.last = None if places is None else places[..., -1:]

        handle = root.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            out = model(**prompt, use_cache=True)
        finally:
            handle.remove()
        self.cache = out.past_key_values
        self.mask = torch.ones_like(ids) if mask is None else mask
        logits: Tensor = out.logits[:, -1:]
        return logits

    def step(self, model: nn.Module, new: Tensor) -> Tensor:
        """Logits of the tokens ``(B, N)`` that follow."""
        self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        given = {"input_ids": new, "attention_mask": self.mask}
        if self.last is not None:
            given["position_ids"] = self.last + torch.arange(1, new.shape[1] + 1, device=new.device)
            self.last = given["position_ids"][..., -1:]
        logits: Tensor = model(**given, past_key_values=self.cache, use_cache=True).logits
        return logits

    def _rows(self, of: Callable[[Tensor], Tensor]) -> None:
        self.mask = of(self.mask)
        if self.last is not None and self.last.shape[-2] > 1:  # one row for all stays one
            self.last = (
                of(self.last) if self.last.dim() == 2 else torch.stack([*map(of, self.last)])
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences in another order."""
        if self.cache is not None:
            self.cache.reorder_cache(beam_idx)
            self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence several times."""
        if self.cache is not None:
            self.cache.batch_repeat_interleave(repeats)
            self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences."""
        if self.cache is not None:
            self.cache.batch_select_indices(indices)
            self._rows(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, ``-tokens_to_remove`` of them."""
        count = abs(tokens_to_remove)
        if self.cache is not None and count:
            self.cache.crop(-count)
            self.mask = self.mask[:, :-count]
            self.last = None if self.last is None else self.last - count

    def reset(self) -> None:
        """Forget the sequence."""
        self.cache, self.last = None, None


@contextmanager
def _own_deltas(model: nn.Module) -> Iterator[None]:
    """Qwen-VL keeps the shift of its running sequence's positions on the model: the generating
    branch's is hidden from this one, whose positions are told, and put back after its pass."""
    found: list[tuple[Any, Any]] = [
        (module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")
    ]
    for module, _ in found:
        module.rope_deltas = None
    try:
        yield
    finally:
        for module, deltas in found:
            module.rope_deltas = deltas
