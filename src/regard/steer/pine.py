"""PINE: documents see each other, and every query orders them by its own attention.

"Eliminating Position Bias of Language Models: A Mechanistic Approach", arXiv 2407.01100. A prompt is a
prefix, documents, and a suffix. Each query of a document or of the suffix places the document that it
finds most important nearest to itself and the others before it, so that the order in which documents
were given has no effect left. Importance is attention without positions.

Followed: wzq016/PINE, ``pine/models/llama/``. There keys are rotated anew for every query; here the
query is, by the same angle the other way round (only the difference counts), so that the attention is
one ordinary call a document, merged by log-sum-exp, in O(N + M) memory.

On models with several axes of positions (Qwen2-VL) documents are text, which stands at one position on
all axes and is moved on all of them alike. Images may stand before and behind the documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from regard.card import Card

from ..core.data_masks import Keys
from ..core.masks import And, Causal, Mask
from ..models.calls import AttentionCall
from ..models.method import Inner, Method
from ..models.rotary import Rotary
from .pine_order import PineLayout as PineLayout
from .pine_order import Rope as Rope
from .pine_order import pine_attention as pine_attention

CARD = Card(
    key="pine",
    title="Eliminating Position Bias of Language Models: A Mechanistic Approach",
    arxiv="2407.01100",
    family="steer",
    entry="regard.steer.pine:PINE",
    definition="tests/steer/test_pine.py::test_is_the_loop_written_out",
    oracle="python -m tests.golden tests/golden/data/pine.npz",
    claim="python -m benchmarks.pine --smollm2",
    cost="python -m benchmarks.pine --only growth",
    note="Documents of equal score are ordered as given, so that ties keep a trace of the order; "
    "every layer must be patched. On models with several axes of positions (Qwen2-VL) documents are "
    "text; images stand before or behind them.",
)


@dataclass(frozen=True)
class PINE(Method):
    """Position-invariant inference in a running model.

        spans = Spans.of(documents=[(12, 60), (60, 95), (95, 140)])
        with regard.patch(model, PINE(), spans=spans):
            model.generate(**inputs)

    Documents lie one behind the other; what stands before them is the prefix, what follows (generated
    tokens too) the suffix. All rows from the first document on change, in every layer; with ``layers``
    left out of the patch order keeps its effect. The documents must be read in one pass. Decoding over
    the cache is what one pass computes. One document is ordinary causal attention. The KV cache is
    left as the model fills it; its keys are rotated back where they are read, which costs as much as
    the attention itself.

    Attributes:
        documents: name of the span whose ranges are the documents.

    Raises:
        ValueError: while running: no such span, ranges with gaps, a pass that cuts the documents, a
            model without rotary embedding, a document that holds an image on a model with several
            axes of positions, a layer that is not causal or whose weights are no plain softmax, or
            another method that changes the same attention.
    """

    documents: str = "documents"

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Attention of a layer with the documents in every query's own order."""
        layout = self.layout(call)
        if len(layout.docs) < 2:
            return inner(call)
        past, stop = call.passing.past, call.passing.past + call.passing.n
        if stop <= layout.prefix:
            return inner(call)
        if (past > layout.prefix and past < layout.end) or stop < layout.end:
            raise ValueError(
                f"PINE: this pass holds columns {past} to {stop}, the documents {layout.prefix} to "
                f"{layout.end}; they see each other, so read them in one pass"
            )
        _check(call)
        rotary = call.rotary
        positions = rotary.key_axes
        if rotary.axes > 1 and past <= layout.prefix:  # what is decoded reads what was checked here
            _check_text(positions, layout, call.own.valid)
        return pine_attention(
            rotary.unrotate(call.q, rotary.query_axes),
            rotary.unrotate(call.k, positions),
            call.v,
            layout,
            _rope(rotary),
            places=positions if rotary.axes > 1 else None,
            scale=call.scale,
            valid=call.own.valid,
        )

    def layout(self, call: AttentionCall) -> PineLayout:
        """The prompt's parts, from the spans."""
        if call.spans is None:
            raise ValueError(
                f"PINE: no span {self.documents!r}; give patch(..., "
                f"spans=Spans.of({self.documents}=[(a, b), (b, c)]))"
            )
        call.spans.end(self.documents)
        docs = sorted(r for r in call.spans.ranges[self.documents] if r[1] > r[0])
        if not docs:
            return PineLayout(0, (), call.m)
        for (_, stop), (start, _) in pairwise(docs):
            if start != stop:
                raise ValueError(
                    f"PINE: a document ends at {stop} and the next one starts at {start}, expected "
                    "documents without gaps"
                )
        sizes = tuple(z - a for a, z in docs)
        # A pass that ends within the documents has a layout too; attend refuses it.
        return PineLayout(docs[0][0], sizes, max(call.m + call.own.offset - docs[-1][1], 0))


def _rope(rotary: Rotary) -> Rope:
    """The model's rotation with positions of every head's own, ``(B, H, L)`` or ``(A, B, H, L)``."""

    def rope(x: Tensor, positions: Tensor) -> Tensor:
        if positions.dim() == 1:
            return rotary.rotate(x, positions[None])
        if positions.dim() == 4 and positions.shape[2] == 1:
            return rotary.rotate(x, positions[:, :, 0])
        own = positions.expand(*positions.shape[:-3], *x.shape[:3]).flatten(-3, -2)
        return rotary.rotate(x.flatten(0, 1)[:, None], own).view_as(x)

    return rope


def _check_text(positions: Tensor, layout: PineLayout, valid: Tensor | None) -> None:
    """Refuse documents whose tokens do not stand one position apart on all axes ``(A, B, M)``."""
    columns = slice(layout.prefix, layout.end)
    inside = positions[..., columns]
    wrong = (inside != inside[:1]).any(0)
    wrong[:, 1:] |= inside[0].diff(dim=-1) != 1
    if valid is not None:
        real = valid[:, columns].clone()
        real[:, 1:] &= real[:, :-1].clone()
        wrong = wrong & real
    found = wrong.any(0).nonzero()
    if found.numel():
        at = layout.prefix + int(found[0])
        raise ValueError(
            f"PINE: column {at} of the documents ({layout.prefix} to {layout.end}) is no text: its "
            f"positions {positions[:, 0, at].tolist()} are not one behind the column before it on every "
            "axis (an image?); leave images before or behind the documents"
        )


def _check(call: AttentionCall) -> None:
    """Refuse what would be lost."""
    plain: tuple[Mask, ...] = call.mask.parts if isinstance(call.mask, And) else (call.mask,)
    found = [part for part in plain if not isinstance(part, Keys)]
    words = None
    if found != [Causal()] or len(plain) > 2 or call.own.offset:
        words = f"attends by {call.mask!r}, expected a causal layer"
    elif call.layout is not None or call.bias is not None:
        words = "has keys chosen or scores biased by another method"
    elif call.softcap is not None or call.sinks is not None:
        words = "has soft-capped scores or sinks"
    elif any(not edit.observes for edit in call.edits):
        words = "has edited logits or weights; PINE makes neither"
    elif call.dropout:
        words = "has dropout, which PINE leaves out"
    if words is not None:
        raise ValueError(f"PINE: layer {call.layer} {words}")
