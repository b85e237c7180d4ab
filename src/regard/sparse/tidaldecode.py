"""TidalDecode: decoding in which most layers read the tokens that an earlier layer chose.

Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
arXiv 2410.05076. Important tokens persist from layer to layer: one early layer computes full attention
and records each head's top-k tokens, the layers after it read only those, and a correction layer in the
middle chooses afresh. Selecting layers cost O(M D) a token and head, all others O(k D); the KV cache
stays whole, and prefill is dense.

Followed: DerrickYLJ/TidalDecode, `src/tidal_build/modify_llama.py`, which emulates it densely (there
the set is kept on the attention module; here it belongs to the forward pass). Head `i` of one layer has
no relation to head `i` of another, so the sharing mode is a knob: choosing together, by the sum of the
heads' weights, keeps far more of a small model's quality at the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.card import Card

from ..core.token_select import check_tokens
from ..models.calls import AttentionCall
from ..models.method import Inner, Method
from .tidaldecode_state import TidalState as TidalState
from .tidaldecode_state import check_layers

CARD = Card(
    key="tidaldecode",
    title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    arxiv="2410.05076",
    family="sparse",
    entry="regard.sparse.tidaldecode:TidalDecode",
    definition="tests/sparse/test_tidaldecode.py::test_is_the_algorithm_written_out",
    oracle="python -m tests.golden tests/golden/data/tidaldecode.npz",
    claim="python -m benchmarks.tidaldecode --claim",
    cost="python -m benchmarks.tidaldecode --only growth",
    note="'Matches full attention' does not hold for SmolLM2-135M with the paper's per-head sets.",
)


@dataclass(frozen=True)
class TidalDecode(Method):
    """Position persistent sparse attention in a running model: ``regard.patch(model, TidalDecode())``.

    Prefill is dense in all layers; each later pass chooses in layers ``start`` and ``correct`` and
    reads the choice elsewhere. New keys and values are cached in every layer as ever. With
    ``teacher_forced`` one pass over a text is what decoding it token by token computes, so that its
    loss can be measured; no N x N tensor is kept.

    Attributes:
        top_k, start, correct, share, own, teacher_forced: as
            :class:`~regard.sparse.tidaldecode_state.TidalState`. The paper's correction layer is
            chosen for each model; its code's defaults are 13 and 9.

    Raises:
        ValueError: a knob is out of range; while running: a sparse layer is reached before any
            choice (``regard.patch(..., layers=...)`` left it out), a layer holds other keys than
            the one that chose (sliding windows drop theirs), another method has chosen already, or
            heads are to choose together although their weights are no plain softmax.
    """

    top_k: int = 256
    start: int = 2
    correct: tuple[int, ...] = (13,)
    share: str = "head"
    own: bool = False
    teacher_forced: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "correct", tuple(self.correct))
        check_tokens("TidalDecode", self.top_k, 1, self.share)
        check_layers("TidalDecode", self.start, self.correct)

    def new_state(self) -> TidalState:
        """The state of one forward pass."""
        return TidalState(
            self.top_k, self.start, self.correct, self.share, self.own, self.teacher_forced
        )

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Full attention, or attention over what this pass has chosen."""
        if call.layout is not None:
            raise ValueError(
                f"TidalDecode: another method has chosen keys in layer {call.layer} already; patch "
                "one of them at a time"
            )
        if self.share != "head" and (call.softcap is not None or call.sinks is not None):
            raise ValueError(
                f"TidalDecode: layer {call.layer} has soft-capped scores or sinks, so that the weights "
                "of its heads cannot be summed as a plain softmax; use share='head'"
            )
        state: TidalState = call.store.setdefault("state", self.new_state())
        layout = state.layout(
            call.layer, call.q, call.k, mask=call.mask, scale=call.scale, bias=call.bias
        )
        if layout is None:
            return inner(call)
        # The mask that the layout holds equals the call's; the same object is not applied again.
        return inner(call.replace(layout=layout, mask=layout.mask))
