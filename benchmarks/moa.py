"""MoA (arXiv 2406.14909): spans of their own for the heads against one span for all, and the cost.

    python -m benchmarks.moa [--json] [--profile]

The paper's claim: heterogeneous spans beat the uniform one at equal density. `--profile` measures it on
SmolLM2 and Python's documentation (N=512, four calibration windows, blocks of 32, four other windows
for the loss), for the three kinds of influence and for attention mass, and for the plan's own spans
given to other heads by chance; about three minutes. Its cost: work and cache in proportion to the mean
span; one backward pass a sample for the profile, without any N x N matrix kept.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.timing import row
from regard.core.token_select import key_mass
from regard.models.calls import AttentionCall
from regard.models.method import Inner, Method
from regard.sparse.moa import (
    Influence,
    MoA,
    MoACache,
    MoAPlan,
    SinkBands,
    plan,
    profile,
    rule_density,
)

from . import main
from .counted import slope
from .smollm2_docs import documents, nll


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Listed pairs of a prompt and slots of the caches after it, for two kinds of spans."""
    rows = []
    for name, alphas, betas in (
        ("spans of N/4 and N/8", (0.0, 0.0), (0.25, 0.125)),
        ("spans of 256 and 512", (256.0, 512.0), (0.0, 0.0)),
    ):
        start = time.perf_counter()
        made, pairs, slots, mean = MoAPlan((alphas,), (betas,)), [], [], []
        for n in sizes:
            spans = made.spans(n)[0]
            mask = SinkBands(tuple((spans - 64).tolist()))
            pairs.append(mask.layout(n, n, 128).listed_pairs())
            cache, some = MoACache(spans), torch.zeros(1, 2, n, 1)
            cache.store(some, some)
            slots.append(cache.slots)
            mean.append(float(spans.double().mean()))
        work = [n * s for n, s in zip(sizes, mean, strict=True)]
        note = (
            f"pairs grow as N^{slope(sizes, pairs):.2f}, slots as N^{slope(sizes, slots):.2f}: "
            f"{slots[-1]:,} of {2 * sizes[-1]:,}; stated N times the mean span, N^"
            f"{slope(sizes, work):.2f}, and the mean span, N^{slope(sizes, mean):.2f}"
        )
        dense = sizes[-1] * (sizes[-1] + 1)
        rows.append(
            row(
                f"{name}, N={sizes[0]}..{sizes[-1]}",
                time.perf_counter() - start,
                None,
                dense / pairs[-1],
                note,
            )
        )
    return rows


class _Mass(Method):
    """Sums of attention weights over blocks, the criterion without a gradient."""

    def __init__(self, block: int) -> None:
        self.block, self.found = block, {}

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        strips = key_mass(
            call.q, call.k, mask=call.mask, block=self.block, share="kv", scale=call.scale
        )
        mass = torch.cat([strip for strip, _ in strips], 2)[0]
        self.found[call.layer] = mass.unflatten(1, (-1, self.block)).sum(2).double()
        return inner(call)


@torch.no_grad()
def attention_mass(model: Any, samples: list[Tensor], block: int) -> Influence:
    """Mean attention mass of the blocks, in the form of a profile."""
    total: Tensor | None = None
    for ids in samples:
        watch = _Mass(block)
        with regard.patch(model, watch):
            model(input_ids=ids, use_cache=False)
        one = torch.stack([watch.found[layer] for layer in sorted(watch.found)])
        total = one if total is None else total + one
    assert total is not None
    return Influence(total / len(samples), samples[0].shape[1], block)


def claim(
    length: int = 512, block: int = 32, first: int = 256, samples: int = 4, windows: int = 4
) -> list[dict[str, Any]]:
    """Loss of SmolLM2 under planned, shuffled and uniform spans at two densities."""
    model, texts = documents(samples + windows, length)
    calibration, texts = texts[:samples], texts[samples:]
    nb = length // block
    rules = [(float(block * n), 0.0) for n in range(1, nb + 1)]
    cost = rule_density(*zip(*rules, strict=True), nb, block)
    rows: list[dict[str, Any]] = []

    def loss_of(name: str, made: MoAPlan | None) -> float:
        print(f"  {name}", file=sys.stderr)
        start = time.perf_counter()
        losses = []
        for ids in texts:
            if made is None:
                losses.append(nll(model, ids, first))
                continue
            with regard.patch(model, MoA(made, "profile")):
                losses.append(nll(model, ids, first))
        mean = sum(losses) / len(losses)
        each = ", ".join(f"{x:.3f}" for x in losses)
        dense = "" if made is None else f"; density {made.density(length):.3f}"
        note = f"{mean:.3f} nats a token (windows: {each}){dense}"
        rows.append(row(name, time.perf_counter() - start, None, None, note))
        return mean

    loss_of("dense", None)
    profiles = {}
    for kind in ("block", "signed", "entry"):
        print(f"  profile, {kind}", file=sys.stderr)
        start = time.perf_counter()
        profiles[f"influence, {kind}"] = profile(model, calibration, block=block, kind=kind)
        note = f"{samples} windows of {length}, blocks of {block}"
        rows.append(row(f"profile, {kind}", time.perf_counter() - start, None, None, note))
    profiles["attention mass"] = attention_mass(model, calibration, block)
    generator = torch.Generator().manual_seed(0)
    for band in (4, 2):
        budget = float(cost[band - 1])
        shape = profiles["attention mass"].blocks.shape[:2]
        uniform = torch.full(shape, band - 1)
        loss_of(f"uniform, {band} blocks and the sink", MoAPlan.of(uniform, rules, block))
        for name, found in profiles.items():
            ids = plan(found.losses(rules), cost, budget)
            loss_of(f"MoA by {name}, budget {budget:.2f}", MoAPlan.of(ids, rules, block))
            if name == "influence, block":
                order = torch.randperm(ids.numel(), generator=generator)
                mixed = ids.flatten()[order].view_as(ids)
                loss_of("the same spans shuffled over all heads", MoAPlan.of(mixed, rules, block))
    return rows


if __name__ == "__main__":
    main((growth,), {"profile": claim}, doc=__doc__)
