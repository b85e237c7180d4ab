"""HyLRA: decoding in which a plan says for each layer: full attention, own selection, or reuse.

"HyLRA: Hybrid Layer Reuse Attention", arXiv 2602.00777. Offline, one pass over a calibration text
tells how dense each layer's attention is and how many of its top chunks other layers share; a dynamic
programme makes a plan of it. While decoding, a full layer costs O(M D) a token and head, a selecting one
O(M D) (less with hash codes), a reusing one O(k D); the KV cache stays whole, and prefill is dense.

    measured = profile(model, ids)                      # regard.sparse.hylra.profile
    made = plan(measured, sparsity=0.87)
    print(made.table(measured))
    with regard.patch(model, LayerReuse(made.policy, made.full, HashBlocks(keep=16))):
        model.generate(...)

Followed: ModelEngine-Group/unified-cache-management, `ucm/sparse/gsa_on_device` (`tools/main.py`, class
RALS), the public form of the code that the paper names; the paper's own notation was not available.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from regard.card import Card

from ..core.select import Selector
from ..core.token_select import TopTokens
from ..models.calls import AttentionCall
from ..models.method import Calibrated, Inner
from .hylra_calibrate import ProfileProbe as ProfileProbe
from .hylra_calibrate import profile as profile
from .hylra_hash import HashBlocks as HashBlocks
from .hylra_plan import ReusePlan as ReusePlan
from .hylra_plan import check_policy
from .hylra_plan import plan as plan
from .hylra_profile import LayerProfile as LayerProfile
from .hylra_state import ReuseState as ReuseState

CARD = Card(
    key="hylra",
    title="HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference",
    arxiv="2602.00777",
    family="sparse",
    entry="regard.sparse.hylra:LayerReuse",
    definition="tests/sparse/test_hylra.py::test_reuse_is_the_runtime_written_out",
    oracle="python -m tests.golden tests/golden/data/hylra.npz",
    claim="python -m benchmarks.hylra --claim",
    cost="python -m benchmarks.hylra --only growth",
    note="Follows the public code of the framework; the paper's own notation was not available.",
)


@dataclass(frozen=True)
class LayerReuse(Calibrated):
    """Selections shared across layers in a running model: ``regard.patch(model, LayerReuse(...))``.

    Prefill is dense in all layers. With ``teacher_forced`` one pass over a text is what decoding it
    token by token computes, so that its loss can be measured.

    Attributes:
        policy: for each layer of the model -1 or the earlier layer whose selection it reuses.
        full: layers with full attention.
        selector: chooses in the other layers with policy -1.
        teacher_forced: see :class:`~regard.sparse.hylra_state.ReuseState`.

    Raises:
        ValueError: a source that does not come before, that reuses itself or that is full; while
            running, as :meth:`ReuseState.layout`, and where another method has chosen already.
    """

    policy: tuple[int, ...]
    full: tuple[int, ...] = ()
    selector: Selector = field(default_factory=TopTokens)
    teacher_forced: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", tuple(self.policy))
        object.__setattr__(self, "full", tuple(sorted(self.full)))
        check_policy("LayerReuse", self.policy, self.full)
        if not isinstance(self.selector, Selector):
            raise ValueError(
                f"LayerReuse: selector must be a Selector, got {type(self.selector).__name__}"
            )

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Full attention, own selection or reuse, as the plan says."""
        if call.layout is not None:
            raise ValueError(
                f"LayerReuse: another method has chosen keys in layer {call.layer} already; patch "
                "one of them at a time"
            )
        store = call.store
        if "state" not in store:
            states = call.cache_store
            store["state"] = ReuseState(
                self.policy, self.full, self.selector, self.teacher_forced, states
            )
        state: ReuseState = store["state"]
        layout = state.layout(call.layer, call.q, call.k, mask=call.mask)
        if layout is None:
            return inner(call)
        # The layout's mask holds the call's; the same object is not applied again.
        return inner(call.replace(layout=layout, mask=layout.mask))
