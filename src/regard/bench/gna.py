"""`regard bench gna-simulate`: how fast a neighbourhood could be, and how fast it is here.

The model is that of arXiv 2504.16922, section 3.3, in :func:`regard.patterns.gna.simulate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attend import attend, plan
from ..patterns.gna import end_to_end, flop_bound, simulate
from ..patterns.neighborhood import Neighborhood
from .timing import paired


def report(
    shape: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    *,
    dilation: Sequence[int] | int = 1,
    causal: bool = False,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    share: float | None = None,
    measure: bool = False,
    tokens: int = 8192,
) -> dict[str, Any]:
    """The best possible speed-up over dense attention, and with `measure` the one on this machine.

    Args:
        shape, window, stride, dilation: of every axis; `causal` goes for all of them.
        q_tile, kv_tile: sides of the tiles, both or neither (then the best ones are searched).
        share: attention's share of a model's time, for the speed-up of the whole.
        measure: also time attention and dense attention, as :func:`measured` does.
        tokens: most tokens to measure on.

    Returns:
        What :func:`regard.patterns.gna.simulate` returns, and `measured`, `None` or a dictionary.
    """
    dilation = dilation if isinstance(dilation, int) else tuple(dilation)
    found = simulate(
        tuple(shape),
        tuple(window),
        tuple(stride),
        q_tile=q_tile,
        kv_tile=kv_tile,
        share=share,
        dilation=dilation,
        causal=causal,
    )
    found["share"] = share
    found["measured"] = None
    if measure:
        mask = Neighborhood(tuple(shape), tuple(window), tuple(stride), dilation, causal)
        found["measured"] = measured(smaller(mask, tokens), share)
    return found


def smaller(mask: Neighborhood, tokens: int) -> Neighborhood:
    """The same pattern on a grid of at most so many tokens: extents, windows, strides over 1, 2, 4...

    Raises:
        ValueError: no such grid, because a window would be smaller than a key.
    """
    for factor in (1 << p for p in range(31)):
        grid = tuple(max(1, extent // factor) for extent in mask.grid)
        if math.prod(grid) > tokens:
            continue
        window = tuple(w // factor for _, w, _, _, _ in mask.rules)
        if min(window) < 1:
            break
        stride = tuple(max(1, s // factor) for _, _, s, _, _ in mask.rules)
        return Neighborhood(grid, window, stride, mask.dilation, mask.causal)
    raise ValueError(f"gna-simulate: no smaller form of {mask!r} has at most {tokens} tokens")


def measured(
    mask: Neighborhood, share: float | None = None, *, heads: int = 2, width: int = 64
) -> dict[str, Any]:
    """Seconds of `attend(mask=mask)` and of PyTorch's dense attention, medians of calls in turn.

    Returns:
        `shape`, `window`, `stride`; `seconds` and `dense_seconds`; their ratio `speedup`; the
        `flop_bound` of this grid, and `tile_bound`, what the tiles that the library chose allow;
        with `share` also `end_to_end`.
    """
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, mask.points, width, generator=g) for _ in range(3))

    def ours() -> Tensor:
        out: Tensor = attend(q, k, v, mask=mask)
        return out

    fast, dense = paired(ours, lambda: F.scaled_dot_product_attention(q, k, v), repeats=3)
    work = plan(q, k, v, mask=mask).density
    found: dict[str, Any] = {
        "shape": mask.grid,
        "window": mask.window,
        "stride": mask.stride,
        "seconds": fast,
        "dense_seconds": dense,
        "speedup": dense / fast,
        "flop_bound": flop_bound(mask.grid, mask.window, mask.stride, mask.dilation, mask.causal),
        "tile_bound": 1 / work if work else None,
    }
    if share is not None:
        found["end_to_end"] = end_to_end(share, found["speedup"])
    return found


def text(found: dict[str, Any]) -> str:
    """A report in lines."""
    sparse = ": perfectly block-sparse" if found["perfectly_block_sparse"] else ""
    lines = [
        f"neighbourhood  {_by(found['shape'])}, window {_by(found['window'])}, "
        f"stride {_by(found['stride'])}",
        f"tiles          {_by(found['q_tile'])} queries, {_by(found['kv_tile'])} keys: "
        f"{found['visited']:,} of {found['total']:,} visited",
        f"best possible  {found['speedup']:.2f} x dense attention; its pairs allow "
        f"{found['flop_bound']:.2f} x{sparse}",
    ]
    if "end_to_end" in found:
        lines.append(
            f"end to end     {found['end_to_end']:.2f} x at a share of {found['share']:.1%}"
        )
    here = found["measured"]
    if here is not None:
        tiles = "" if here["tile_bound"] is None else f", its tiles {here['tile_bound']:.2f} x"
        lines.append(
            f"measured here  {here['speedup']:.2f} x on {_by(here['shape'])}, window "
            f"{_by(here['window'])}, stride {_by(here['stride'])}, where pairs allow "
            f"{here['flop_bound']:.2f} x{tiles}"
        )
        if "end_to_end" in here:
            lines.append(f"               {here['end_to_end']:.2f} x end to end")
    return "\n".join(lines)


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
