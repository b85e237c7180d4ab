"""One decoding step of HyLRA: which layers look at all keys, which choose, and which reuse a choice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.attend import attend
from ..core.layout import BlockLayout
from ..core.masks import Causal, Mask
from ..core.select import Selector
from .hylra_plan import check_policy


@dataclass(eq=False)
class ReuseState:
    """What the layers of one forward pass share (arXiv 2602.00777).

    A layer in ``full`` reads all keys; one with ``policy[l] = -1`` reads what ``selector`` chooses
    there; one with ``policy[l] = s`` reads what layer ``s`` chose. Call :meth:`begin_step` before each
    token; a prompt (as many queries as keys) is dense.

    Attributes:
        policy: for each layer -1 or an earlier layer that selects.
        full: layers with full attention.
        selector: chooses; its choice is shared by heads as its layout says.
        teacher_forced: treat every row of a prompt as a decoding step of its own; the selector must
            choose for single rows.
        states: the selector's state in each layer, kept from step to step.
    """

    policy: Sequence[int]
    full: Collection[int]
    selector: Selector
    teacher_forced: bool = False
    states: dict[Any, Any] = field(default_factory=dict)
    _layouts: dict[int, BlockLayout] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_policy("ReuseState", self.policy, self.full)

    def begin_step(self) -> None:
        """Forget what was chosen: a new token comes. The selector's states stay."""
        self._layouts.clear()

    def layout(
        self, layer: int, q: Tensor, k: Tensor, *, mask: Mask | None = None
    ) -> BlockLayout | None:
        """What a layer reads: ``None`` for everything that the mask allows.

        Args:
            layer: index of the layer; layers come in order.
            q, k: ``(B, H, N, D)``, the last ``N`` of ``M`` positions, and ``(B, Hkv, M, D)``.
            mask: where a query may look, by default causal.

        Raises:
            ValueError: the policy has no such layer; its source has not run in this step or holds
                other keys; or the selector made one choice for several sequences.
        """
        n, m = q.shape[2], k.shape[2]
        if not 0 <= layer < len(self.policy):
            raise ValueError(
                f"LayerReuse: the policy has {len(self.policy)} layers, the model a layer {layer}"
            )
        if layer in self.full or (n == m and not self.teacher_forced):
            return None
        mask = Causal() if mask is None else mask
        source = self.policy[layer]
        if source < 0:
            return self._select(layer, q, k, mask)
        kept = self._layouts.get(source)
        if kept is None:
            raise ValueError(
                f"LayerReuse: layer {layer} reuses layer {source}, which has chosen nothing in this "
                "step; patch it too"
            )
        if (kept.n, kept.m) != (n, m) or kept.index.shape[0] not in (1, q.shape[0]):
            raise ValueError(
                f"LayerReuse: layer {layer} has {n} queries, {m} keys and batch {q.shape[0]}, but "
                f"layer {source} chose for {kept.n}, {kept.m} and {kept.index.shape[0]}; call "
                "begin_step() before each token, and plan only layers that hold the same keys"
            )
        if kept.mask == mask:
            return kept
        # A layer with another mask of its own, a window for instance.
        return kept.under(mask)

    def _select(self, layer: int, q: Tensor, k: Tensor, mask: Mask) -> BlockLayout:
        if layer not in self.states:
            self.states[layer] = self.selector.new_state()
        layout = self.selector.select(q, k, mask=mask, state=self.states[layer])
        if self.teacher_forced and q.shape[2] > 1 and layout.block_q != 1:
            raise ValueError(
                f"LayerReuse: teacher_forced needs a choice for every row, but {self.selector!r} "
                f"chose for {layout.block_q} rows together"
            )
        if q.shape[0] > 1 and layout.index.shape[0] == 1:
            raise ValueError(
                f"LayerReuse: {self.selector!r} made one choice for a batch of {q.shape[0]}, expected "
                "one for each sequence"
            )
        self._layouts[layer] = layout
        return layout

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None = None
    ) -> Tensor:
        """The output ``(B, H, N, Dv)`` of one layer; arguments as for :meth:`layout`."""
        mask = Causal() if mask is None else mask
        layout = self.layout(layer, q, k, mask=mask)
        mask = mask if layout is None else layout.mask
        out: Tensor = attend(q, k, v, mask=mask, layout=layout)
        return out
