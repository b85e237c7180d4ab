"""Faster Neighborhood Attention: the fused algorithm on tiles, and the unfused one on windows.

Hassani et al., "Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the
Threadblock Level", arXiv 2403.04690. `fused_na` tiles the grid in space and never holds the
`N Π w` scores (section 3.3); given tiles it runs the paper's algorithm as it is written, box by box
with a running softmax, otherwise the library's block-sparse kernels do the same work. `na_qk` and
`na_av` are the unfused pair, for looking at the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.card import Card

from .neighborhood import neighborhood_attention
from .neighborhood_mask import Axes, Flags, Neighborhood, interval
from .neighborhood_windows import na_av as na_av
from .neighborhood_windows import na_qk as na_qk

CARD = Card(
    key="fna",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the "
    "Threadblock Level",
    arxiv="2403.04690",
    family="kernel",
    entry="regard.patterns.fna:fused_na",
    definition="tests/patterns/test_fna.py::test_every_form_equals_the_rule_in_float64",
    oracle="python -m tests.golden tests/golden/data/fna.npz",
    claim="python -m benchmarks.fna",
    cost="tests/patterns/test_fna.py::test_listed_pairs_grow_linearly",
    note="The algorithm on every device PyTorch runs on; the CUTLASS kernels are not copied.",
)


def fused_na(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Axes,
    dilation: Axes = 1,
    causal: Flags = False,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Neighbourhood attention without `N Π w` scores.

    Args:
        q, k, v: `(B, *grid, H or Hkv, D)`.
        window, dilation, causal: as in `Neighborhood`.
        q_tile, kv_tile: sides of the tiles of queries and keys, both or neither. With them the
            paper's algorithm runs box by box, to be read and tested; without, the fast path.
        scale: factor on the scores, default `D ** -0.5`.
        return_lse: also return the natural log-sum-exp `(B, *grid, H)`.

    Returns:
        `(B, *grid, H, Dv)`, and with `return_lse` also `(B, *grid, H)`.
    """
    if (q_tile is None) != (kv_tile is None):
        raise ValueError("fused_na: q_tile and kv_tile come together")
    if q_tile is None or kv_tile is None:
        return neighborhood_attention(
            q,
            k,
            v,
            window,
            dilation=dilation,
            causal=causal,
            scale=scale,
            return_lse=return_lse,
        )
    mask = Neighborhood(tuple(q.shape[1:-2]), window, 1, dilation, causal)
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if len(tile) != len(mask.grid) or any(side < 1 for side in tile):
            raise ValueError(
                f"fused_na: {name} must have {len(mask.grid)} sides >= 1, got {tuple(tile)}"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(group, -2) for x in (k, v))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=dtype)
    lse = q.new_zeros(q.shape[:-1], dtype=dtype)
    # Step 1: residue classes are grids of their own, not dilated.
    for residue in itertools.product(*(range(d) for d in mask.steps)):
        at = (
            slice(None),
            *(slice(g, None, d) for g, d in zip(residue, mask.steps, strict=True)),
        )
        part = [x[at].to(dtype) for x in (q, k, v)]
        inner = replace(mask, grid=tuple(part[0].shape[1:-2]), dilation=1)
        out[at], lse[at] = _undilated(
            part[0] * scale, part[1], part[2], inner, tuple(q_tile), tuple(kv_tile)
        )
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _undilated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Neighborhood,
    q_tile: tuple[int, ...],
    kv_tile: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3 of the algorithm, on one residue class."""
    axes = range(len(mask.grid))
    windows = [
        interval(torch.arange(extent), extent, w, s, causal)
        for extent, w, s, _, causal in mask.rules
    ]
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_zeros(q.shape[:-1])
    for start in _corners(mask.grid, q_tile):
        here = [slice(a, min(a + t, n)) for a, t, n in zip(start, q_tile, mask.grid, strict=True)]
        bounds = [(windows[x][0][here[x]], windows[x][1][here[x]]) for x in axes]
        least = [int(lo.min()) for lo, _ in bounds]
        most = [int(hi.max()) for _, hi in bounds]
        place = (slice(None), *here)
        rows = q[place].flatten(1, -3).transpose(1, 2)
        top = torch.full_like(rows[..., 0], torch.finfo(rows.dtype).min)
        total, found = torch.zeros_like(top), rows.new_zeros(*rows.shape[:-1], v.shape[-1])
        for step in _corners([z - a for a, z in zip(least, most, strict=True)], kv_tile):
            keys = [
                range(least[x] + step[x], min(least[x] + step[x] + kv_tile[x], most[x]))
                for x in axes
            ]
            box = (slice(None), *(slice(r.start, r.stop) for r in keys))
            cols, values = (x[box].flatten(1, -3).transpose(1, 2) for x in (k, v))
            s = rows @ cols.transpose(-1, -2)
            inside = _inside(bounds, keys)
            if inside is not None:
                s = s.masked_fill(~inside.to(s.device), float("-inf"))
            # A box may hold no key of a row: the maximum stays finite.
            higher = torch.maximum(top, s.detach().amax(-1))
            p, fade = torch.exp(s - higher[..., None]), torch.exp(top - higher)
            total = total * fade + p.sum(-1)
            found = found * fade[..., None] + p @ values
            top = higher
        shape = [piece.stop - piece.start for piece in here]
        out[place] = (found / total[..., None]).transpose(1, 2).unflatten(1, shape)
        lse[place] = (top + total.log()).transpose(1, 2).unflatten(1, shape)
    return out, lse


def _corners(extents: Sequence[int], tile: Sequence[int]) -> Any:
    return itertools.product(*(range(0, n, t) for n, t in zip(extents, tile, strict=True)))


def _inside(bounds: list[tuple[Tensor, Tensor]], keys: list[range]) -> Tensor | None:
    """Allowed pairs of a query box and a key box; None where all are, so that nothing is masked."""
    whole, inside = True, torch.ones(1, 1, dtype=torch.bool)
    for (lo, hi), places in zip(bounds, keys, strict=True):
        t = torch.arange(places.start, places.stop)
        one = (t >= lo[:, None]) & (t < hi[:, None])
        whole = whole and bool(one.all())
        # Row-major order of the boxes is the Kronecker product of the axes.
        inside = torch.kron(inside, one)
    return None if whole else inside
