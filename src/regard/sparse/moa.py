"""MoA: every head its own sliding window, which grows with the length, chosen by what it would lose.

Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", arXiv
2406.14909. A head keeps the first tokens and a span `alpha + beta N`. A profile gives the first-order
change of the loss for every masked block (:func:`influence`, :func:`profile`); an integer program picks
one rule for each head within a budget of density (:func:`plan`, :func:`pareto_plans`). Work and cache at
run time grow with the mean span; the layers' weights stay as they are.

    rules = candidates([2048, 4096, 8192])
    found = profile(model, samples)
    ids = plan(found.losses(rules), cost, 0.5)          # cost: rule_density(...) of each rule
    with regard.patch(model, MoA(MoAPlan.of(ids, rules))):
        model.generate(...)

Followed: thu-nics/MoA. There the profile's pattern has the sink block in addition to the band, while
the cache's span includes the sinks; both are here. Its profiling code sums absolute entries where the
paper sums signed ones; `kind` names all three. For shared key heads it takes the largest influence of
heads that lie a group's count apart; here the heads of a key head are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.masks import Mask
from regard.models.calls import AttentionCall
from regard.models.made_for import MadeFor
from regard.models.method import Method, both

from .moa_cache import MoACache as MoACache
from .moa_plan import MoAPlan as MoAPlan
from .moa_plan import pick as pick
from .moa_profile import Influence as Influence
from .moa_profile import block_influence as block_influence
from .moa_profile import influence as influence
from .moa_profile import profile as profile
from .moa_profile import rule_losses as rule_losses
from .moa_rules import SinkBands as SinkBands
from .moa_rules import candidates as candidates
from .moa_rules import moa_layout as moa_layout
from .moa_rules import rule_density as rule_density
from .moa_rules import runtime_spans as runtime_spans
from .moa_solve import pareto_plans as pareto_plans
from .moa_solve import plan as plan

CARD = Card(
    key="moa",
    title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    arxiv="2406.14909",
    family="sparse",
    entry="regard.sparse.moa:MoA",
    definition="tests/sparse/test_moa.py::test_influence_is_the_first_order_change_of_masking",
    oracle="python -m tests.golden tests/golden/data/moa.npz",
    claim="python -m benchmarks.moa --profile",
    cost="python -m benchmarks.moa --only growth",
    note="Plans come from a Lagrangian greedy or a dynamic program instead of a commercial solver.",
)


def moa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | list[int],
    *,
    sinks: int = 64,
    scale: float | None = None,
) -> Tensor:
    """Attention in which each key head's queries read the sinks and the last keys of a span.

    Args:
        q: `(B, H, N, D)`, the last `N` of `M` positions.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`.
        spans: `(Hkv,)`, keys of a row: `sinks` of the first and `span - sinks` of the last.
        scale: factor on the scores, default `D ** -0.5`.

    Returns:
        `(B, H, N, Dv)`.

    Raises:
        ValueError: not one span for each key head, or one that leaves no room beside the sinks.
    """
    widths = [int(x) for x in spans]
    if len(widths) != k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"moa_attention: spans must be one for each of {k.shape[1]} key heads, got {widths}"
        )
    if min(widths) <= sinks:
        raise ValueError(f"moa_attention: spans must be larger than sinks={sinks}, got {widths}")
    group = q.shape[1] // k.shape[1]
    bands = tuple(width - sinks for width in widths for _ in range(group))
    out: Tensor = attend(q, k, v, mask=SinkBands(bands, sinks), scale=scale)
    return out


@dataclass(frozen=True)
class MoA(Method):
    """A plan in a running model: ``regard.patch(model, MoA(plan))``, in prefill and decoding.

    Spans belong to the length of the prompt (with its padding) and stay while tokens are generated.
    The model's own cache keeps every key; :class:`MoACache` is the one that saves memory.

    Attributes:
        plan: one rule for each key head (or each query head) of each layer.
        rule: ``"cache"``, the token spans of the runtime cache, or ``"profile"``, the block patterns
            that the profile judges.
        new_tokens: tokens that will be generated, for the spans of ``"cache"``.
        sinks: tokens at the start that all see; for ``"profile"`` it is one block.

    Raises:
        ValueError: an unknown rule; while running: a plan of other layers or heads than the model's.
    """

    plan: MoAPlan
    rule: str = "cache"
    new_tokens: int = 0
    sinks: int = 64

    def __post_init__(self) -> None:
        if self.rule not in ("cache", "profile"):
            raise ValueError(f"MoA: rule must be 'cache' or 'profile', got {self.rule!r}")
        if self.new_tokens < 0 or self.sinks < 0:
            raise ValueError(
                f"MoA: new_tokens and sinks must be >= 0, got {self.new_tokens} and {self.sinks}"
            )

    @property
    def made_for(self) -> MadeFor | None:
        """The model that the plan was profiled on."""
        return self.plan.made_for

    def bands(self, layer: int, length: int) -> SinkBands:
        """The mask of a layer, one band for each head of the plan."""
        if self.rule == "profile":
            return SinkBands(tuple(self.plan.bands(length)[layer].tolist()), 1, self.plan.block)
        spans = self.plan.spans(length, self.new_tokens)[layer]
        # Where all that will ever come fits beside the sinks, the band does not matter.
        return SinkBands(tuple((spans - self.sinks).clamp(min=1).tolist()), self.sinks)

    def mask(self, pattern: Mask, call: AttentionCall) -> Mask:
        """The model's pattern and the layer's spans."""
        (layers, heads), h, hkv = self.plan.shape, call.q.shape[1], call.k.shape[1]
        config = getattr(call.module, "config", None)
        count = getattr(config, "num_hidden_layers", max(layers, call.layer + 1))
        if count != layers or heads not in (hkv, h):
            raise ValueError(
                f"MoA: the plan is for {layers} layers of {heads} heads, but the model has {count} "
                f"layers, and layer {call.layer} {h} query heads and {hkv} key heads; see "
                "MoAPlan.grouped"
            )
        own = self.bands(call.layer, call.prompt)
        bands = torch.tensor(own.bands).repeat_interleave(h // heads)
        spread = SinkBands(tuple(bands.tolist()), own.sinks, own.unit)
        return both(pattern, call.place(spread))
