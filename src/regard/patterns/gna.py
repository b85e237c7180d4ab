"""Generalized Neighborhood Attention: strides, and how fast a configuration could be.

Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed
of Light", arXiv 2504.16922. With a stride `s`, groups of `s` neighbouring queries share the window of
one of them (section 3.1), so that tiles of queries need fewer and fuller tiles of keys. The function is
:func:`regard.patterns.neighborhood.neighborhood_attention`; here is the paper's analytical model
(section 3.3): a kernel computes whole tiles, so its speed-up over dense attention is at most the
number of all tiles over the number of those that some query of a query tile looks into.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from regard.card import Card

from .neighborhood_mask import Axes, Flags, Neighborhood, interval

CARD = Card(
    key="gna",
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    arxiv="2504.16922",
    family="kernel",
    entry="regard.patterns.gna:simulate",
    definition="tests/patterns/test_gna.py::test_equals_the_rule_in_float64",
    oracle="python -m tests.golden tests/golden/data/gna.npz",
    claim="python -m benchmarks.gna",
    cost="tests/patterns/test_gna.py::test_listed_pairs_grow_linearly",
    note="Attention itself is regard.patterns.neighborhood:neighborhood_attention.",
)


@dataclass(frozen=True)
class Tiling:
    """What the analytical model says of one configuration.

    Attributes:
        q_tile, kv_tile: sides of the tiles, an entry for each axis.
        visited: (query tile, key tile) pairs that a kernel computes.
        total: all pairs of tiles.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    visited: int
    total: int

    @property
    def speedup(self) -> float:
        """At most so many times faster than dense attention."""
        return self.total / self.visited


def simulate_tiles(
    shape: Sequence[int],
    window: Axes,
    stride: Axes,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    *,
    dilation: Axes = 1,
    causal: Flags = False,
) -> Tiling:
    """Count the tiles that a kernel visits.

    A query tile visits, on every axis, the key tiles that cover the union of its queries' windows;
    the counts of the axes multiply. Residue classes of a dilation are tiled apart.

    Args:
        shape: extents of the grid.
        window, stride, dilation, causal: as in `Neighborhood`.
        q_tile, kv_tile: sides of the tiles, an entry for each axis.

    Raises:
        ValueError: a tile of another rank, or a side below 1.
    """
    mask = Neighborhood(tuple(shape), window, stride, dilation, causal)
    axes = len(mask.grid)
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if len(tile) != axes or any(side < 1 for side in tile):
            raise ValueError(
                f"simulate_tiles: {name} must have {axes} sides >= 1, got {tuple(tile)}"
            )
    visited = total = 1
    for rule, tq, tk in zip(mask.rules, q_tile, kv_tile, strict=True):
        one, all_ = _axis(rule, tq, tk)
        visited, total = visited * one, total * all_
    return Tiling(tuple(q_tile), tuple(kv_tile), visited, total)


def _axis(rule: tuple[int, int, int, int, bool], tq: int, tk: int) -> tuple[int, int]:
    """Visited and all pairs of tiles on one axis, summed over its residue classes."""
    extent, w, s, d, causal = rule
    visited = total = 0
    for g in range(d):
        length = -(-(extent - g) // d)
        first = torch.arange(0, length, tq)
        last = (first + tq).clamp(max=length) - 1
        # Both ends of an interval grow with the place.
        lo = interval(first, length, w, s, causal)[0] // tk
        hi = (interval(last, length, w, s, causal)[1] - 1) // tk
        visited += int((hi - lo + 1).sum())
        total += len(first) * -(-length // tk)
    return visited, total


def best_tiles(
    shape: Sequence[int],
    window: Axes,
    stride: Axes = 1,
    *,
    q_tokens: int = 256,
    kv_tokens: int = 128,
    dilation: Axes = 1,
    causal: Flags = False,
) -> list[Tiling]:
    """All tilings with so many tokens in a tile, sides powers of two, the fastest first.

    Args:
        q_tokens, kv_tokens: tokens in a tile of queries and of keys, powers of two; defaults are
            those of the paper's kernel for Blackwell.
    """
    mask = Neighborhood(tuple(shape), window, stride, dilation, causal)
    sides_q = _tiles(len(mask.grid), q_tokens, "q_tokens")
    sides_kv = _tiles(len(mask.grid), kv_tokens, "kv_tokens")
    # An axis is counted once for each pair of sides, not once for each pair of tiles.
    counted: dict[tuple[int, int, int], tuple[int, int]] = {}

    def axis(at: int, tq: int, tk: int) -> tuple[int, int]:
        key = (at, tq, tk)
        if key not in counted:
            counted[key] = _axis(mask.rules[at], tq, tk)
        return counted[key]

    found = []
    for tq, tk in itertools.product(sides_q, sides_kv):
        pairs = [axis(at, *sides) for at, sides in enumerate(zip(tq, tk, strict=True))]
        found.append(Tiling(tq, tk, math.prod(v for v, _ in pairs), math.prod(t for _, t in pairs)))
    # Ragged tiles make more tiles of the grid than it needs: only the visited ones cost.
    return sorted(found, key=lambda one: (one.visited, one.q_tile, one.kv_tile))


def _tiles(axes: int, tokens: int, name: str) -> list[tuple[int, ...]]:
    if tokens < 1 or tokens & (tokens - 1):
        raise ValueError(f"best_tiles: {name} must be a power of two, got {tokens}")
    sides = [1 << p for p in range(tokens.bit_length())]
    return [t for t in itertools.product(sides, repeat=axes) if math.prod(t) == tokens]


def simulate(
    shape: Sequence[int],
    window: Axes,
    stride: Axes = 1,
    *,
    dilation: Axes = 1,
    causal: Flags = False,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    q_tokens: int = 256,
    kv_tokens: int = 128,
    share: float | None = None,
) -> dict[str, Any]:
    """The best possible speed-up of a configuration over dense attention, as plain data.

    Args:
        shape, window, stride, dilation, causal: as in `Neighborhood`.
        q_tile, kv_tile: sides of the tiles, both or neither; default the best ones of `q_tokens` and
            `kv_tokens` tokens.
        share: attention's share of a model's time, for `end_to_end`.

    Returns:
        `shape`, `window`, `stride`, `dilation`, `causal`, `q_tile`, `kv_tile`, `visited`, `total`,
        `speedup`, `flop_bound` (all pairs over allowed pairs), `perfectly_block_sparse` (the two are
        equal), and with `share` also `end_to_end`.
    """
    if (q_tile is None) != (kv_tile is None):
        raise ValueError("simulate: q_tile and kv_tile come together")
    mask = Neighborhood(tuple(shape), window, stride, dilation, causal)
    if q_tile is not None and kv_tile is not None:
        tiling = simulate_tiles(
            shape, window, stride, q_tile, kv_tile, dilation=dilation, causal=causal
        )
    else:
        tiling = best_tiles(
            shape,
            window,
            stride,
            q_tokens=q_tokens,
            kv_tokens=kv_tokens,
            dilation=dilation,
            causal=causal,
        )[0]
    bound = flop_bound(shape, window, stride, dilation, causal)
    speedup = tiling.speedup
    found: dict[str, Any] = {
        "shape": mask.grid,
        **{x: getattr(mask, x) for x in ("window", "stride", "dilation", "causal")},
        **asdict(tiling),
        "speedup": speedup,
        "flop_bound": bound,
        "perfectly_block_sparse": math.isclose(speedup, bound),
    }
    if share is not None:
        found["end_to_end"] = end_to_end(share, speedup)
    return found


def flop_bound(
    shape: Sequence[int],
    window: Axes,
    stride: Axes = 1,
    dilation: Axes = 1,
    causal: Flags = False,
) -> float:
    """All pairs over allowed pairs: `Π L / Π w` where no axis is causal."""
    mask = Neighborhood(tuple(shape), window, stride, dilation, causal)
    pairs = 1
    for extent, w, s, d, is_causal in mask.rules:
        kept = 0
        for g in range(d):
            length = -(-(extent - g) // d)
            lo, hi = interval(torch.arange(length), length, w, s, is_causal)
            kept += int((hi - lo).sum())
        pairs *= kept
    return mask.points**2 / pairs


def end_to_end(share: float, speedup: float) -> float:
    """Speed-up of a model that spends `share` of its time in attention (Amdahl's law)."""
    if not 0 <= share <= 1 or speedup <= 0:
        raise ValueError(
            f"end_to_end: expected share in [0, 1] and speedup > 0, got {share} and {speedup}"
        )
    return 1 / (1 - share + share / speedup)
