"""Calibrations of sparse attention: plans for the layers and heads of a model."""

from __future__ import annotations

from dataclasses import replace

from ..sparse.hylra_calibrate import profile as layer_profile
from ..sparse.hylra_plan import plan as reuse_plan
from ..sparse.moa_plan import MoAPlan
from ..sparse.moa_profile import profile as influence_profile
from ..sparse.moa_rules import rule_density
from ..sparse.moa_solve import plan as span_plan
from .calibrate_given import Given, Made


def hylra(
    given: Given,
    *,
    sparsity: float = 0.91,
    rho: float = 0.3,
    chunk: int | None = None,
    keep: int | None = None,
    sink: int | None = None,
    recent: int | None = None,
    steps: int | None = None,
) -> Made:
    """Which layers stay full, select, or reuse another's selection.

    By default the sizes are in the authors' proportions to 32,768 tokens (64, 2048, 64, 512), and the
    last quarter of the text counts as decoding steps.
    """
    n = given.ids.shape[1]
    given.fits(n)
    sizes = {
        name: max(least, n // part) if size is None else size
        for name, size, part, least in (
            ("chunk", chunk, 512, 1),
            ("keep", keep, 16, 1),
            ("sink", sink, 512, 0),
            ("recent", recent, 64, 0),
            ("steps", steps, 4, 1),
        )
    }
    measured = layer_profile(given.model, given.ids, **sizes)
    found = replace(reuse_plan(measured, sparsity, rho), made_for=given.made_for)
    layers = [
        {
            "layer": layer,
            "role": "full" if layer in found.full else "select" if source < 0 else "reuse",
            "reads": None if source < 0 else source,
            "density": measured.density[layer],
            "overlap": None if source < 0 else measured.overlap[source][layer],
        }
        for layer, source in enumerate(found.policy)
    ]
    return found.save, {"layers": layers, "sizes": sizes}


def moa(
    given: Given,
    *,
    budget: float = 0.5,
    samples: int = 4,
    block: int = 32,
    kind: str = "block",
    max_rules: int = 2,
) -> Made:
    """A span for every key head, a share of the length: one profiled length tells no more.

    The text is cut into ``samples`` windows; ``budget`` is the mean density of the plan.
    """
    n = given.ids.shape[1]
    if samples < 1 or n % samples:
        raise ValueError(f"calibrate: samples must divide the length {n}, got {samples}")
    if not 1 <= block < n // samples:
        raise ValueError(
            f"calibrate: block must lie in [1, {n // samples}), a sample's tokens, got {block}"
        )
    given.fits(n // samples)
    influence = influence_profile(given.model, given.ids.chunk(samples, 1), block=block, kind=kind)
    blocks = influence.blocks.shape[-1]
    shares = [band / blocks for band in range(1, blocks + 1)]
    rules = [(0.0, share) for share in shares]
    cost = rule_density([0.0] * blocks, shares, blocks, block)
    lost = influence.losses(rules)
    ids = span_plan(lost, cost, budget, max_rules=max_rules)
    found = MoAPlan.of(ids, rules, block, given.made_for)
    same = int((cost <= budget).nonzero().max())
    return found.save, {
        "layers": [
            {"layer": layer, "spans": list(shares)} for layer, shares in enumerate(found.betas)
        ],
        "density": found.density(n // samples),
        "influence": {
            "plan": float(lost.gather(-1, ids[..., None]).sum()),
            "uniform": float(lost[..., same].sum()),
        },
    }
