"""A selector as a method: sparse attention chosen from the content, in a running model."""

from __future__ import annotations

from torch import Tensor

from ..core.select import Selector
from .calls import AttentionCall
from .method import Inner, Method


class SelectMethod(Method):
    """Attends only to the key blocks that a selector chooses, in every patched layer.

    ``regard.patch(model, selector)`` makes one by itself. The selector's state lives with the KV
    cache, one for each layer.

    Args:
        selector: see :class:`~regard.core.select.Selector`.
        prefill: whether it chooses where many tokens are read at once.
        decode: whether it chooses where few tokens follow a cache: a decoding step, a question. Such
            passes cost little, and what is asked for must be found: prefill alone is what most
            published methods make sparse.
        few: how many tokens are few, default 1.
        first: layers before this one stay dense. The first layers' attention is the most diffuse,
            and most papers leave it alone.
    """

    def __init__(
        self,
        selector: Selector,
        *,
        prefill: bool = True,
        decode: bool = True,
        few: int = 1,
        first: int = 0,
    ) -> None:
        if not isinstance(selector, Selector):
            raise ValueError(
                f"SelectMethod: expected a Selector, got {type(selector).__name__}: {selector!r}"
            )
        if not (prefill or decode):
            raise ValueError("SelectMethod: prefill and decode are both False: nothing to do")
        if first < 0 or few < 1:
            raise ValueError(
                f"SelectMethod: first must be a layer >= 0 and few >= 1, got {first} and {few}"
            )
        self.selector, self.prefill, self.decode = selector, prefill, decode
        self.few, self.first = few, first

    def __repr__(self) -> str:
        layers = f" from layer {self.first} on" if self.first else ""
        both = self.prefill and self.decode
        where = "" if both else " in prefill" if self.prefill else " in decoding"
        return f"{self.selector!r}{where}{layers}"

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Choose, then attend."""
        wanted = self.decode if call.n <= self.few and call.decoding else self.prefill
        if not wanted or call.layer < self.first:
            return inner(call)
        if call.layout is not None:
            raise ValueError(
                f"patch: {self.selector!r} would choose key blocks in layer {call.layer}, but "
                "another method has chosen already; patch one of them at a time"
            )
        store = call.cache_store
        if call.layer not in store:
            store[call.layer] = self.selector.new_state()
        layout = self.selector.select(call.q, call.k, mask=call.mask, state=store[call.layer])
        return inner(call.replace(layout=layout))
