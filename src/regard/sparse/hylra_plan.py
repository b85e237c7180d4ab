"""HyLRA's plan: which layers stay full, which select, and which reuse whose selection (DP)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..models.made_for import MadeFor
from .hylra_profile import LayerProfile

# A state of the search: smallest and summed overlap so far, and the source before.
_State = tuple[float, float, int]


def best_reuse(overlap: Sequence[Sequence[float]], resets: int) -> tuple[list[int], float, float]:
    """The source of every layer that maximises (smallest, summed) overlap, lexicographically.

    Going through the layers, a layer either keeps the current source ``i`` and is paid
    ``overlap[i][j]``, or becomes its own source, is paid 1 and uses one of ``resets``. Layer 0 is its
    own source for nothing. One best state is kept for each (source, resets used): the smallest
    overlap is optimal, the sum among equally good ones only nearly so.

    Args:
        overlap: ``(L, L)``; the upper triangle is read.
        resets: how many later layers may become sources.

    Returns:
        ``(sources, smallest, total)``; ``sources[l] <= l``, equal where ``l`` is its own source.
    """
    layers = len(overlap)
    if layers == 0:
        raise ValueError("best_reuse: overlap is empty, expected at least one layer")
    if resets < 0:
        raise ValueError(f"best_reuse: resets must be >= 0, got {resets}")
    # best[j][i, c] is the best way to layer j with source i after c resets.
    best: list[dict[tuple[int, int], _State]] = [{(0, 0): (1.0, 1.0, -1)}]
    for j in range(1, layers):
        now: dict[tuple[int, int], _State] = {}
        for (i, c), (low, total, _) in sorted(best[-1].items()):
            paid = float(overlap[i][j])
            now[i, c] = (min(low, paid), total + paid, i)
            fresh = (min(low, 1.0), total + 1.0, i)
            if c < resets and ((j, c + 1) not in now or fresh[:2] > now[j, c + 1][:2]):
                now[j, c + 1] = fresh
        best.append(now)
    # Of equals the first by source, then by resets, as the authors' loops find it.
    at = max(sorted(best[-1]), key=lambda state: best[-1][state][:2])
    low, total, _ = best[-1][at]
    sources = []
    for j in range(layers - 1, -1, -1):
        i, c = at
        sources.append(i)
        at = (best[j][at][2], c - 1 if i == j and c > 0 else c)
    return sources[::-1], low, total


@dataclass(frozen=True)
class ReusePlan:
    """What each layer does while decoding.

    Attributes:
        policy: for each layer -1 (its own source) or the earlier layer whose selection it reuses.
        full: layers with full attention, ascending; their policy is -1.
        objective: smallest and summed overlap of the search.
        sparsity, rho: what it was planned for.
        made_for: the model that it was profiled on, if it is known.
    """

    policy: tuple[int, ...]
    full: tuple[int, ...]
    objective: tuple[float, float]
    sparsity: float
    rho: float
    made_for: MadeFor | None = field(default=None, repr=False, compare=False)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        data = asdict(self)
        if self.made_for is None:
            del data["made_for"]
        Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ReusePlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            ValueError: another file.
        """
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        needed = ("policy", "full", "objective", "sparsity", "rho")
        if not isinstance(given, dict) or not given.keys() >= set(needed):
            raise ValueError(
                f"ReusePlan.load: {path} is no plan: expected {', '.join(needed)} in it"
            )
        return cls(
            policy=tuple(given["policy"]),
            full=tuple(given["full"]),
            objective=(given["objective"][0], given["objective"][1]),
            sparsity=given["sparsity"],
            rho=given["rho"],
            made_for=MadeFor.read(given.get("made_for"), f"ReusePlan.load: {path}"),
        )

    def table(self, profile: LayerProfile | None = None) -> str:
        """A Markdown table, one line a layer; with a profile its density and overlap too."""
        lines = ["| layer | role | reads | density | overlap |", "|--:|---|--:|--:|--:|"]
        for layer, source in enumerate(self.policy):
            role = "full" if layer in self.full else "select" if source < 0 else "reuse"
            reads = "" if source < 0 else str(source)
            density = f"{profile.density[layer]:.3f}" if profile else ""
            shared = f"{profile.overlap[source][layer]:.2f}" if profile and source >= 0 else ""
            lines.append(f"| {layer} | {role} | {reads} | {density} | {shared} |")
        return "\n".join(lines)


def check_policy(name: str, policy: Sequence[int], full: Collection[int]) -> None:
    """Raise ``ValueError`` unless every layer's source is an earlier one that selects."""
    for layer, source in enumerate(policy):
        where = f"{name}: policy[{layer}] is {source!r}"
        if isinstance(source, bool) or not isinstance(source, int) or source < -1:
            raise ValueError(f"{where}, expected -1 or an earlier layer")
        if source >= layer:
            raise ValueError(f"{where}, which does not come before layer {layer}")
        if source >= 0 and policy[source] != -1:
            raise ValueError(f"{where}, a layer that reuses another's selection itself")
        if source >= 0 and source in full:
            raise ValueError(f"{where}, a layer with full attention, which selects nothing")
        if source >= 0 and layer in full:
            raise ValueError(f"{where}, but layer {layer} is in full")
    wrong = [layer for layer in full if not 0 <= layer < len(policy)]
    if wrong:
        raise ValueError(f"{name}: full names layers {wrong}, but policy has {len(policy)}")


def densest(density: Sequence[float], sparsity: float) -> tuple[int, ...]:
    """The ``ceil(L (1 - sparsity))`` densest layers, ascending; of equals the later."""
    count = math.ceil(len(density) * (1 - sparsity))
    order = sorted(range(len(density)), key=lambda layer: density[layer])
    return tuple(sorted(order[len(order) - count :]))


def merged_overlap(overlap: Sequence[Sequence[float]], full: Collection[int]) -> list[list[float]]:
    """The overlaps with rows and columns of ``full`` layers 0 and the diagonal 1."""
    layers = range(len(overlap))
    return [
        [1.0 if i == j else 0.0 if i in full or j in full else float(overlap[i][j]) for j in layers]
        for i in layers
    ]


def plan(profile: LayerProfile, sparsity: float = 0.91, rho: float = 0.3) -> ReusePlan:
    """Roles of the layers from their profile.

    The densest ``ceil(L (1 - sparsity))`` layers stay full; the others share selections as
    :func:`best_reuse` finds with ``ceil(L sparsity rho) + #full`` resets. A full layer costs two of
    them, because the source before it is lost.

    Args:
        profile: from :func:`~regard.sparse.hylra_calibrate.profile`.
        sparsity: share of layers that are not full, in [0, 1].
        rho: share of those that select for themselves, in [0, 1].

    Raises:
        ValueError: a share outside [0, 1].
    """
    for name, value in (("sparsity", sparsity), ("rho", rho)):
        if not 0 <= value <= 1:
            raise ValueError(f"plan: {name} must lie in [0, 1], got {value}")
    layers = len(profile.density)
    full = densest(profile.density, sparsity)
    resets = math.ceil(layers * sparsity * rho) + len(full)
    sources, low, total = best_reuse(merged_overlap(profile.overlap, full), resets)
    policy = tuple(-1 if source == layer else source for layer, source in enumerate(sources))
    return ReusePlan(policy, full, (low, total), sparsity, rho)
