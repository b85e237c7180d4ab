"""Static patterns: each against dense attention as a share of its bound, and how its cost grows.

    python -m benchmarks.patterns [--json] [--quick] [--flex] [--only speed|growth|natten]

``speed`` is ``attend(mask=pattern)`` over PyTorch's dense fused attention (causal where the pattern
is) at N >= 8192. ``bound`` is dense pairs over allowed pairs; the note says how many of the pairs in
the blocks or tiles that are read are allowed, which is the share that tiles of this size leave possible.
``growth`` gives slopes of log over log from 1k to 64k tokens beside the stated ones. ``natten`` is
against NATTEN on the same machine. ``--flex`` adds FlexAttention, which compiles for every pattern.
``--quick`` runs small sizes, to see that everything runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import attend
from regard.bench.timing import paired, row, seconds
from regard.core.attend import plan

from . import main
from .patterns_cases import GROWTH, Case, speed_cases

H, D = 8, 64
# Timed attention stops growing at so many listed pairs, summed over heads: seconds, not minutes.
_MOST_PAIRS = 1 << 29


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    quick: bool = False
    growth: tuple[int, ...] = (1024, 4096, 16384, 65536)
    natten: int = 64


FULL = Sizes()
QUICK = Sizes(quick=True, growth=(1024, 4096), natten=16)


def qkv(n: int, heads: int = H) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(1, heads, n, D, generator=g) for _ in range(3)]


def speed(sizes: Sizes = FULL) -> list[dict[str, Any]]:
    """Every pattern over dense SDPA."""
    return [_over_sdpa(case, repeats=1 if sizes.quick else 3) for case in speed_cases(sizes.quick)]


def _over_sdpa(case: Case, repeats: int) -> dict[str, Any]:
    mask, n = case.mask, case.tokens
    q, k, v = qkv(n)

    def ours() -> Any:
        return case.run(q, k, v)

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    density = mask.density(n)
    dense = (n + 1) / (2 * n) if case.causal else 1.0
    work = plan(q, k, v, mask=mask).density
    note = f"{density:.2%} of all pairs"
    if work:
        note += f"; {density / work:.0%} of the pairs that are read"
    if case.call is not None:
        note += f" by attend(mask=...), here through {case.through}"
    taken = paired(ours, theirs, repeats=repeats)
    return row(f"{case.name}, N={n}", *taken, dense / density, note)


def growth(sizes: Sizes = FULL) -> list[dict[str, Any]]:
    """Pairs that are read and seconds over N, as slopes of log over log."""
    rows = []
    for name, (make, heads, stated, words) in GROWTH.items():
        lengths, listed, times = sizes.growth, [], []
        for n in lengths:
            mask = make(n)
            q, k, v = qkv(getattr(mask, "tokens", n), heads)
            chosen = plan(q, k, v, mask=mask, backend="blocks")
            assert chosen.density is not None
            listed.append(chosen.density * q.shape[2] ** 2)
            if listed[-1] * heads <= _MOST_PAIRS:
                run = partial(attend, q, k, v, mask=mask, backend="blocks")
                times.append(seconds(run, repeats=1 if sizes.quick else 3))
        timed = lengths[: len(times)]
        work = [stated(n) for n in lengths]
        found, expected = (
            f"N^{slope(lengths, y):.2f}, at the end N^{slope(lengths[-2:], y[-2:]):.2f}"
            for y in (listed, work)
        )
        note = (
            f"pairs read grow as {found}; stated {words}: {expected}; "
            f"time as N^{slope(timed, times):.2f} up to N={timed[-1]}"
        )
        rows.append(row(f"growth: {name}", times[-1], None, None, note))
    return rows


def slope(x: tuple[int, ...], y: list[Any]) -> float:
    """Slope of log y over log x by least squares."""
    across, up = [math.log(a) for a in x], [math.log(b) for b in y]
    middle, centre = sum(across) / len(across), sum(up) / len(up)
    spread = sum((a - middle) ** 2 for a in across)
    pairs = zip(across, up, strict=True)
    return sum((a - middle) * (b - centre) for a, b in pairs) / spread if spread else math.nan


def natten(sizes: Sizes = FULL) -> list[dict[str, Any]]:
    """Neighbourhoods against NATTEN. On a CPU it has only flex-fna, and refuses to compile that."""
    from regard.patterns.neighborhood import Neighborhood

    side = sizes.natten
    settings = (
        ((side * side,), side, 1, 1),
        ((side, side), side // 4, 1, 1),
        ((side, side), side // 4, side // 8, 1),
        ((side, side), side // 8, 1, 4),
        ((8, side // 2, side // 4), (4, side // 8, side // 8), 1, 1),
    )
    heads, rows = 2, []
    for grid, window, stride, dilation in settings:
        n = math.prod(grid)
        mask = Neighborhood(grid, window, stride, dilation)
        q, k, v = qkv(n, heads)
        name = f"{len(grid)}-D window {window} stride {stride} dilation {dilation}, N={n}"
        ours = partial(attend, q, k, v, mask=mask)
        try:
            import natten.functional as their

            fn = getattr(their, f"na{len(grid)}d")
        except ImportError as error:
            rows.append(row(f"{name}: over NATTEN", seconds(ours), note=f"no NATTEN: {error}"))
            continue
        last = [x.transpose(1, 2).reshape(1, *grid, heads, D).contiguous() for x in (q, k, v)]

        theirs = partial(fn, *last, window, stride=stride, dilation=dilation, backend="flex-fna")
        try:
            gap = (theirs().reshape(1, n, heads, D).transpose(1, 2) - ours()).abs().max().item()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            note = f"NATTEN does not run here: {_first_line(error)}"
            rows.append(row(f"{name}: over NATTEN", seconds(ours), note=note))
            continue
        taken = paired(ours, theirs, repeats=1 if sizes.quick else 3)
        note = f"its flex-fna uncompiled, which makes all N x N scores; gap {gap:.0e}"
        rows.append(row(f"{name}: over NATTEN", *taken, None, note))
    return rows


def flex(sizes: Sizes = FULL) -> list[dict[str, Any]]:
    """Every pattern over FlexAttention, compiled, with the block mask of the same pattern."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Sizes as constants: with dynamic ones, some patterns become C++ that does not compile.
    compiled, rows = torch.compile(flex_attention, dynamic=False), []
    for case in speed_cases(sizes.quick):
        n, mask = case.tokens, case.mask
        q, k, v = qkv(n)
        ours = partial(case.run, q, k, v)
        name = f"{case.name}, N={n}: over FlexAttention"
        torch.compiler.reset()  # or the compiler gives up after a few patterns
        try:
            blocks = create_block_mask(mask.flex(n), None, mask.heads, n, n, device="cpu")

            theirs = partial(compiled, q, k, v, block_mask=blocks)
            gap = (theirs() - ours()).abs().max().item()
        except Exception as error:  # a compiler's errors are of any kind
            note = f"FlexAttention cannot: {type(error).__name__}: {_first_line(error)}"
            rows.append(row(name, seconds(ours), note=note))
            continue
        taken = paired(ours, theirs, repeats=1 if sizes.quick else 3)
        rows.append(row(name, *taken, None, f"gap {gap:.0e}"))
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:120]


def _sized(benchmark: Callable[[Sizes], Any], sizes: Sizes) -> Callable[[], Any]:
    def sized() -> Any:
        return benchmark(sizes)

    sized.__name__, sized.__doc__ = benchmark.__name__, benchmark.__doc__
    return sized


if __name__ == "__main__":
    # --quick changes every benchmark, so it is read before the options that choose among them.
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--quick", action="store_true")
    own, sys.argv[1:] = parser.parse_known_args()
    chosen = QUICK if own.quick else FULL
    main(
        [_sized(fn, chosen) for fn in (speed, growth, natten)],
        {"flex": _sized(flex, chosen)},
        __doc__,
    )
