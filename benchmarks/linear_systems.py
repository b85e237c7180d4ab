"""Tokens a second against length of every linear system, as a layer: is its cost O(N)?

    python -m benchmarks.linear_systems [--json]

Sequences of 1k to 256k tokens, images of side 32 to 512; forward pass without gradients. The time of a
token at each length stands over its mean over the lengths, 1 where the cost is O(N). Lengths are run in
turn, several times, so that all of them see the same machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.bench.timing import row, seconds
from regard.linear.agent_layer import AgentAttention
from regard.linear.hybrid_linear import TokenMixer
from regard.linear.hybrid_linear_kinds import KINDS
from regard.linear.hyperzzw import HyperInteraction
from regard.linear.inline import InLineAttention
from regard.linear.lamamba import LaMambaBlock
from regard.linear.lightnet_layer import LightNetAttention
from regard.linear.lightning2 import decay_slopes, lightning_attention
from regard.linear.mambaout import GatedCNNBlock
from regard.linear.mhs_vm import MultiHeadScan
from regard.linear.miras_layer import MirasLayer
from regard.linear.rala import RALA
from regard.linear.soft import SOFTAttention
from regard.linear.tnl import TNLAttention

from . import main

SIDES = (32, 64, 128, 256, 512)
ROUNDS = 3
# Tokens a round at every length at least, so that short calls are not all overhead of the clock.
_TOKENS = 1 << 15
# Heads of 64 channels. Layers that expand a token to thousands of numbers are measured at _NARROW.
_DIM, _HEADS, _NARROW = 256, 4, 64
Call = Callable[[], Any]
Make = Callable[[int], Call]


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _lightning(side: int) -> Call:
    q, k, v = (_draw(1, _HEADS, side**2, _DIM // _HEADS) for _ in range(3))
    return lambda: lightning_attention(q, k, v, decay_slopes(_HEADS))


def _sequence(layer: Callable[[int], Any], width: int = _DIM) -> Make:
    """A layer on `(1, N, C)`."""

    def make(side: int) -> Call:
        x, made = _draw(1, side**2, width), layer(side)
        return lambda: made(x)

    return make


def _soft(side: int) -> Call:
    # 64 landmarks at every size
    x, layer = _draw(1, side**2, _DIM), SOFTAttention(_DIM, _HEADS, side // 8)
    return lambda: layer(x, (side, side))


def _image(layer: Callable[[int], Any], width: int = _DIM, *, last: bool = False) -> Make:
    """A layer on `(1, C, side, side)`, or with channels last."""

    def make(side: int) -> Call:
        made = layer(side)
        x = _draw(1, side, side, width) if last else _draw(1, width, side, side)
        return lambda: made(x)

    return make


def _lamamba(side: int) -> Call:
    x, c = _draw(1, side, side, _NARROW), _draw(1, _NARROW)
    block = LaMambaBlock(_NARROW, _NARROW, side)
    return lambda: block(x, c)


SYSTEMS: dict[str, Make] = {
    "lightning2": _lightning,
    "tnl": _sequence(lambda side: TNLAttention(_DIM, _HEADS, 1, 2)),
    "lightnet": _sequence(lambda side: LightNetAttention(_DIM, _HEADS)),
    "rala": _image(lambda side: RALA(_DIM, _HEADS)),
    "inline": _sequence(lambda side: InLineAttention(_DIM, _HEADS, side)),
    "soft": _soft,
    "agent": _sequence(lambda side: AgentAttention(_DIM, _HEADS, side)),
    **{
        f"hybrid-linear, {kind}": _sequence(lambda side, k=kind: TokenMixer(k, _DIM, _HEADS))  # type: ignore[misc]
        for kind in KINDS
    },
    "miras, Yaad": _sequence(lambda side: MirasLayer(_NARROW, _HEADS), _NARROW),
    "hyperzzw": _image(lambda side: HyperInteraction(_DIM, side)),
    "mambaout": _image(lambda side: GatedCNNBlock(_DIM), last=True),
    "lamamba": _lamamba,
    "mhs-vm": _image(lambda side: MultiHeadScan(66), 66),
}


@torch.no_grad()
def flat() -> list[dict[str, Any]]:
    """Time of a token of every system at four lengths."""
    rows = []
    for name, make in SYSTEMS.items():
        torch.manual_seed(0)
        calls = {side**2: make(side) for side in SIDES}
        taken: dict[int, list[float]] = {n: [] for n in calls}
        for call in calls.values():
            call()
        for _ in range(ROUNDS):
            for n, call in calls.items():
                repeats = max(1, _TOKENS // n)
                taken[n].append(seconds(call, repeats=repeats, warmup=0) / n)
        token = {n: statistics.median(times) for n, times in taken.items()}
        mean = statistics.mean(token.values())
        shares = ", ".join(f"{n // 1024}k {t / mean:.2f}" for n, t in token.items())
        most = max(abs(t / mean - 1) for t in token.values())
        longest = max(token)
        note = (
            f"{1 / token[longest]:,.0f} tokens/s; over the mean: {shares}; at most {most:.0%} off"
        )
        rows.append(row(name, token[longest] * longest, note=note))
    return rows


if __name__ == "__main__":
    main([flat], {}, __doc__)
