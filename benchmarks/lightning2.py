"""Lightning Attention-2 (arXiv 2401.04658): time a token over the length, and counted work.

    python -m benchmarks.lightning2 [--json] [--only per_token|growth]

The paper's claim: tiled, a token costs the same however long the sequence is; masked and quadratic, it
costs in proportion to the length. `per_token` times both (float32, 2 heads of width 32, tiles of 128);
`growth` counts the multiplications and additions of matrix products of both. The bound of `per_token`
is their ratio, which leaves out that the quadratic form also makes its (N, N) mask.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.timing import row, seconds
from regard.linear.lightning2 import decay_slopes, lightning_attention

from . import main
from .counted import slope

HEADS, WIDTH = 2, 32


def quadratic_form(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """`((Q K^T) * M) V`, as the authors' dense reference has it."""
    at = torch.arange(q.shape[2], dtype=q.dtype)
    apart = (at[:, None] - at).masked_fill(at[:, None] < at, torch.inf)
    mask = torch.exp(-slopes.to(q.dtype)[:, None, None] * apart)
    return (q @ k.mT * mask) @ v


def _inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, n, WIDTH, generator=generator).unbind(0)
    return q, k, v


def flops(n: int, chunk: int | None) -> int:
    """Counted operations of one call, tiled by `chunk` or quadratic."""
    q, k, v = _inputs(n)
    with FlopCounterMode(display=False) as counter:
        if chunk is None:
            quadratic_form(q, k, v, decay_slopes(HEADS))
        else:
            lightning_attention(q, k, v, decay_slopes(HEADS), chunk=chunk)
    return counter.get_total_flops()


def per_token(
    sizes: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16384),
    quadratic: Sequence[int] = (512, 1024, 2048, 4096),
    chunk: int = 128,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Seconds of a call, tiled and quadratic, and microseconds a token."""
    rows: list[dict[str, Any]] = []
    ours: dict[int, float] = {}
    theirs: dict[int, float] = {}
    slopes = decay_slopes(HEADS)
    for n in sizes:
        x = _inputs(n)
        ours[n] = seconds(partial(lightning_attention, *x, slopes, chunk=chunk), repeats)
        note, bound = f"tiled {ours[n] / n * 1e6:.2f} us a token", None
        if n in quadratic:
            theirs[n] = seconds(partial(quadratic_form, *x, slopes), repeats)
            note += f", quadratic {theirs[n] / n * 1e6:.2f}"
            bound = flops(n, None) / flops(n, chunk)
        rows.append(row(f"N={n}, c={chunk}", ours[n], theirs.get(n), bound, note))
    first, last = sizes[min(1, len(sizes) - 1)], sizes[-1]
    flat = ours[last] / last / (ours[first] / first)
    a, z = quadratic[0], quadratic[-1]
    grown = theirs[z] / z / (theirs[a] / a)
    note = (
        f"a token costs {flat:.2f} times as much at N={last} as at N={first} tiled; "
        f"{grown:.2f} times as much at N={z} as at N={a} in the quadratic form"
    )
    rows.append(row("time a token", ours[last], None, None, note))
    return rows


def growth(
    sizes: Sequence[int] = (512, 1024, 2048, 4096, 8192), chunk: int = 128
) -> list[dict[str, Any]]:
    """Operations of matrix products over N: the slope of log over log."""
    rows = []
    forms = ((f"tiled, c={chunk}", chunk), ("quadratic", None))
    for name, tile in forms:
        start = time.perf_counter()
        work = [flops(n, tile) for n in sizes]
        taken = time.perf_counter() - start
        note = (
            f"operations grow as N^{slope(sizes, work):.3f}; a token and head takes "
            f"{work[0] / sizes[0] / HEADS:.0f} at N={sizes[0]}, "
            f"{work[-1] / sizes[-1] / HEADS:.0f} at N={sizes[-1]}"
        )
        rows.append(row(f"growth over N={sizes[0]}..{sizes[-1]}: {name}", taken, note=note))
    return rows


if __name__ == "__main__":
    main((per_token, growth), doc=__doc__)
