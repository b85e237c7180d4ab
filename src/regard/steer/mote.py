"""MoTE: finds the experts that separate two behaviours, and switches them off or on in the router.

Dahlke et al., "Mixture of Tunable Experts -- Behavior Modification of DeepSeek-R1 at Inference Time",
arXiv 2502.11096. How much routing weight each expert gets from the prompts of one behaviour, less that
of the others, ranks the experts ("functional token resonance imaging"); tuning the first ones changes
the behaviour without training.

The paper itself could not be read, and two summaries of it disagree: on the score (``kind`` of
:func:`~regard.steer.mote_resonance.behaviour_score`) and on what switching off means (``mode`` of
:class:`TunedExperts`). Both readings of both are here. Shared experts are always on and no part of
this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.card import Card

from ..models import saved
from ..models.method import Inside, Method
from ..models.sites import find_layers
from .mote_resonance import router_in
from .mote_route import Mode, route

CARD = Card(
    key="mote",
    title="Mixture of Tunable Experts -- Behavior Modification of DeepSeek-R1 at Inference Time",
    arxiv="2502.11096",
    family="steer",
    entry="regard.steer.mote:TunedExperts",
    definition="tests/steer/test_mote.py::test_is_the_routing_written_out",
    oracle="tests/steer/test_mote_resonance.py::test_planted_expert_ranks_first_and_can_be_switched_off",
    claim="python -m benchmarks.mote --train",
    cost="python -m benchmarks.mote --only growth",
    note="UNVERIFIED: from two summaries that disagree; `mode` and `kind` hold both readings. The claim "
    "does not show on the toy languages, which the small model also speaks without its experts.",
)

Expert: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class TunedExperts(Method):
    """Experts of a running mixture switched off and on.

        top = resonance_table(behaviour_score(routing_map(model, ids), labels), 10)
        with regard.patch(model, TunedExperts(off=[(l, e) for l, e, _ in top.rows])):
            model.generate(**inputs)

    Every row of every pass is routed so, those of the prompt included. Nothing is kept between passes,
    so that caches, batches, padding and beams need no care. Of several that are on, nested or side by
    side, each switches its experts. No spans are needed.

    Attributes:
        off, on: ``(layer, expert)`` pairs; none of either changes nothing.
        mode: what ``off`` means, see :func:`~regard.steer.mote_route.route`.

    Raises:
        ValueError: an unknown mode; on entering: a pair that the model has not, or experts that do
            not fit its ``top_k`` or what an outer patch has switched; while running: a router that
            does not choose by softmax.
    """

    off: Sequence[Expert] = ()
    on: Sequence[Expert] = ()
    mode: Mode = "drop"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            known = ", ".join(get_args(Mode))
            raise ValueError(f"TunedExperts: mode must be one of {known}, got {self.mode!r}")
        for name in ("off", "on"):
            pairs = tuple((int(layer), int(expert)) for layer, expert in getattr(self, name))
            object.__setattr__(self, name, pairs)

    def hooks(self, inside: Inside) -> Sequence[RemovableHandle]:
        """One hook at the router of each layer that is named."""
        layers = find_layers(inside.root)
        routers = {at: router_in(sites.layer) for at, sites in enumerate(layers)}
        if all(router is None for router in routers.values()):
            name = type(inside.root).__name__
            raise ValueError(f"TunedExperts: {name} has no top-k router that regard knows")
        named = sorted({layer for layer, _ in (*self.off, *self.on)})
        wrong = [layer for layer in named if routers.get(layer) is None]
        if wrong:
            raise ValueError(f"TunedExperts: layers {wrong} have no router")
        wanted: list[tuple[nn.Module, _Switches]] = []
        for layer in named:
            if layer in inside.layers:
                wanted.append((routers[layer], self._at(layer)))
        for router, mine in wanted:  # so that a mistake is told before the model runs
            _Switches.together([*_on(router).values(), mine]).check(router)
        handles: list[RemovableHandle] = []
        for router, mine in wanted:
            handles.append(router.register_forward_hook(_tune(mine), prepend=True))
            # Torch's handle, of the list of switches: it takes them off with the hook.
            handles.append(RemovableHandle(_on(router)))
            _on(router)[handles[-1].id] = mine
        return handles

    def _at(self, layer: int) -> _Switches:
        off, on = ([e for at, e in pairs if at == layer] for pairs in (self.off, self.on))
        return _Switches.of(off, on, self.mode)

    def save(self, path: str | Path) -> None:
        """Write the pairs (safetensors) and the mode (JSON in its header)."""
        pairs = {
            name: torch.tensor(getattr(self, name), dtype=torch.int64).reshape(-1, 2)
            for name in ("off", "on")
        }
        saved.write(path, "mote", pairs, {"mode": self.mode})

    @classmethod
    def load(cls, path: str | Path) -> TunedExperts:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another file.
        """
        tensors, knobs = saved.read(path, "mote", "TunedExperts")
        return cls(tensors["off"].tolist(), tensors["on"].tolist(), **knobs)


@dataclass(frozen=True, eq=False)
class _Switches:
    """Experts of one router: weightless after the choice, out of it, and always in it."""

    dropped: frozenset[int]
    masked: frozenset[int]
    lit: frozenset[int]

    @classmethod
    def of(cls, off: Sequence[int], on: Sequence[int], mode: Mode) -> _Switches:
        """What one method switches."""
        dark = frozenset(off)
        dropped, masked = (dark if mode == kind else frozenset() for kind in ("drop", "mask"))
        return cls(dropped, masked, frozenset(on))

    @classmethod
    def together(cls, among: Iterable[_Switches]) -> _Switches:
        """What several methods switch."""
        each = list(among)
        return cls(
            frozenset().union(*(one.dropped for one in each)),
            frozenset().union(*(one.masked for one in each)),
            frozenset().union(*(one.lit for one in each)),
        )

    def check(self, router: Any) -> None:
        """Raises ValueError when the router cannot choose so."""
        logits = torch.zeros(1, router.num_experts)
        route(logits, router.top_k, off=self.dropped, on=self.lit, mode="drop")
        route(logits, router.top_k, off=self.masked, on=self.lit, mode="mask")

    def route(self, logits: Tensor, top_k: int, norm: bool) -> tuple[Tensor, Tensor]:
        """Weights and indices ``(T, top_k)`` for ``(T, E)``."""
        if self.masked:
            logits = logits.index_fill(
                -1, torch.tensor(sorted(self.masked)).to(logits.device), -torch.inf
            )
        return route(logits, top_k, off=self.dropped, on=self.lit, norm=norm)


_SWITCHED: WeakKeyDictionary[nn.Module, OrderedDict[int, _Switches]] = WeakKeyDictionary()


def _on(router: nn.Module) -> OrderedDict[int, _Switches]:
    """What is switched at a router, in the order of entering."""
    return _SWITCHED.setdefault(router, OrderedDict())


def _tune(mine: _Switches) -> Callable[..., Any]:
    """Forward hook of a router. Of several the one entered last acts, for all: it runs first, on what
    the router itself chose."""

    def tune(router: Any, args: Any, output: Any) -> Any:
        switches = _on(router)
        if next(reversed(switches.values())) is not mine:
            return None
        logits, weights, indices = output
        norm = bool(getattr(router, "norm_topk_prob", True))
        plain, at = route(logits, router.top_k, norm=norm)
        if not torch.equal(at, indices) or not torch.allclose(plain, weights, atol=1e-2):
            raise ValueError(
                f"TunedExperts: {type(router).__name__} does not choose by softmax alone"
            )
        return logits, *_Switches.together(switches.values()).route(logits, router.top_k, norm)

    return tune
