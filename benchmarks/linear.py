"""The recurrence's speed: tokens a second against length, causal SDPA, and a peer's PyTorch path.

    python -m benchmarks.linear [--json] [--only flat|crossover|training|decode]
    FLA=<folder of an unpacked fla-core wheel> python -m benchmarks.linear --peer --only peer

8 heads of width 64, float32. `flat` is the time of a token at each length over its mean: 1
where the cost is O(N). `crossover` is where the chunked form overtakes causal SDPA. `peer` loads the
reference files of flash-linear-attention (they need einops), none of which needs Triton.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import recur
from regard.bench.timing import paired, row, seconds

from . import main

H, D = 8, 64
Inputs = dict[str, Tensor]

# name: which of decay and beta it has
VARIANTS = {
    "no decay": (),
    "constant decay (lightning, RetNet)": ("constant",),
    "token decay (simple GLA, Mamba-2)": ("token",),
    "channel decay (GLA, HGRN-2)": ("channel",),
    "delta rule": ("beta",),
    "gated delta rule": ("token", "beta"),
    "channel decay and delta rule (KDA)": ("channel", "beta"),
}


def inputs(n: int, parts: tuple[str, ...], grad: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "q": draw(1, H, n, D),
        "k": F.normalize(draw(1, H, n, D), dim=-1),
        "v": draw(1, H, n, D),
    }
    if "constant" in parts:
        given["decay"] = -torch.exp2(-torch.arange(1.0, H + 1))
    if "token" in parts:
        given["decay"] = F.logsigmoid(draw(1, H, n) + 3)
    if "channel" in parts:
        given["decay"] = F.logsigmoid(draw(1, H, n, D) + 3)
    if "beta" in parts:
        given["beta"] = draw(1, H, n).sigmoid()
    return {name: x.requires_grad_(grad) for name, x in given.items()}


def flat() -> list[dict[str, Any]]:
    """Time of a token from 1k to 256k, over its mean; lengths in turn, so that all see one machine."""
    lengths = (1024, 4096, 16384, 65536, 262144)
    rows = []
    for name, parts in VARIANTS.items():
        calls = {n: inputs(n, parts) for n in lengths}
        taken: dict[int, list[float]] = {n: [] for n in lengths}
        for _ in range(5):
            for n, given in calls.items():
                repeats = max(1, 32768 // n)
                taken[n].append(seconds(lambda x=given: recur(**x), repeats) / n)  # type: ignore[misc]
        token = {n: statistics.median(times) for n, times in taken.items()}
        mean = statistics.mean(token.values())
        shares = ", ".join(f"{n // 1024}k {t / mean:.2f}" for n, t in token.items())
        longest = lengths[-1]
        note = f"{1 / token[longest]:,.0f} tokens/s; time a token over the mean: {shares}"
        rows.append(row(f"flat, {name}", token[longest] * longest, note=note))
    return rows


def _sdpa(given: Inputs) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], is_causal=True
    )


def crossover() -> list[dict[str, Any]]:
    """Chunked recurrence over causal SDPA at growing lengths."""
    rows = []
    for name, parts in VARIANTS.items():
        for n in (512, 1024, 2048, 4096, 8192, 16384):
            given = inputs(n, parts)
            taken = paired(lambda x=given: recur(**x), _sdpa(given), repeats=3)  # type: ignore[misc]
            rows.append(row(f"crossover, {name}, N={n}: over causal SDPA", *taken))
    return rows


def training() -> list[dict[str, Any]]:
    """Forward and backward, over those of causal SDPA."""
    rows = []
    for name, parts in VARIANTS.items():
        for n in (2048, 8192):
            given = inputs(n, parts, grad=True)

            def step(fn: Callable[[], Tensor], of: list[Tensor]) -> Callable[[], Any]:
                return lambda: torch.autograd.grad(fn().sum(), of)

            ours = step(lambda x=given: recur(**x), list(given.values()))  # type: ignore[misc]
            theirs = step(_sdpa(given), [given[x] for x in "qkv"])
            taken = paired(ours, theirs, repeats=3)
            rows.append(row(f"training, {name}, N={n}: over causal SDPA", *taken))
    return rows


def decode() -> list[dict[str, Any]]:
    """One token from a state: the same after any context; `theirs` is SDPA over 4k keys."""
    rows = []
    cache = inputs(4096, ())
    for name, parts in VARIANTS.items():
        given = inputs(1, parts)
        state = torch.randn(1, H, D, D)

        def ours(given: Inputs = given, state: Tensor = state) -> Any:
            return recur(**given, state=state, return_state=True)

        def theirs(given: Inputs = given) -> Tensor:
            return F.scaled_dot_product_attention(given["q"], cache["k"], cache["v"])

        rows.append(row(f"decode, {name}", *paired(ours, theirs, repeats=51)))
    return rows


def peer() -> list[dict[str, Any]]:
    """Chunked reference functions of flash-linear-attention, of which FLA names the folder."""
    folder = Path(os.environ.get("FLA", "."))
    rows = []
    for name, file, function, first in (
        ("no decay", "linear_attn", "naive_chunk_linear_attn", False),
        ("token decay (simple GLA, Mamba-2)", "simple_gla", "naive_chunk_simple_gla", False),
        ("delta rule", "delta_rule", "delta_rule_chunkwise", True),
        ("gated delta rule", "gated_delta_rule", "naive_chunk_gated_delta_rule", False),
        ("channel decay and delta rule (KDA)", "kda", "naive_chunk_kda", False),
    ):
        fn = getattr(_load(folder / "fla" / "ops" / file / "naive.py"), function)
        for n in (2048, 8192):
            given = inputs(n, VARIANTS[name])
            # Theirs has heads behind tokens, but for the delta rule.
            last = {x: y if first else y.transpose(1, 2).contiguous() for x, y in given.items()}
            rest = [last[x] for x in ("decay", "beta") if x in last]

            def theirs(
                fn: Callable[..., Any] = fn, last: Inputs = last, rest: list[Tensor] = rest
            ) -> Tensor:
                out = fn(last["q"], last["k"], last["v"], *rest)
                found: Tensor = out[0] if isinstance(out, tuple) else out
                return found

            def ours(given: Inputs = given) -> Tensor:
                out: Tensor = recur(**given, scale=D**-0.5)
                return out

            expected = theirs()
            if expected.shape != ours().shape:
                expected = expected.transpose(1, 2)
            gap = float((ours() - expected).abs().max())
            taken = paired(ours, theirs, repeats=3)
            rows.append(row(f"{name}, N={n}: over fla's {function}", *taken, note=f"gap {gap:.0e}"))
    return rows


def _load(path: Path) -> Any:
    if not path.is_file():
        raise SystemExit(
            f"benchmarks.linear: there is no {path}; FLA must name an unpacked fla-core"
        )
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main([flat, crossover, training, decode], {"peer": peer}, __doc__)
