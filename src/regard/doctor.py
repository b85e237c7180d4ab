"""What works on this machine: versions, devices, backends, and what ``auto`` picks and why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .bench.timing import machine, seconds
from .core.attend import attend, execute, plan
from .core.backends import NAMES
from .core.masks import Causal, Mask, Sinks, SlidingWindow

PACKAGES = (
    "torch",
    "transformers",
    "gguf",
    "safetensors",
    "accelerate",
    "triton",
    "matplotlib",
    "jinja2",
    "typer",
    "rich",
)
# Each compiles for up to a minute before its first result.
COMPILED = ("flex",)
TOLERANCE = 1e-4


def report(compiled: bool = False, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Everything that ``regard doctor`` says, as plain data.

    Args:
        compiled: also run the backends that compile first (about a minute).
        progress: told what is being done.

    Returns:
        ``{"versions", "machine", "memory": {"new_ms", "kept_ms"}, "backends": [{"name", "state",
        "why", "error"}], "calls": [{"call", "backend", "reason", "density"}]}``. ``memory`` is the
        time that 64 MB take to be filled, new and used before. A backend's state is ``works``,
        ``wrong`` (its result differs from the definition by ``error``), ``fails`` (it claimed to
        work and raised), ``not run`` or ``unavailable``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for name in NAMES:
        if progress is not None:
            progress(f"backend {name}")
        found.append(_try_backend(name, device, compiled))
    if progress is not None:
        progress("typical calls")
    return {
        "versions": _versions(),
        "machine": machine(),
        "memory": _memory(),
        "backends": found,
        "calls": [_typical(words, device, **call) for words, call in _CALLS.items()],
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "regard": __version__,
        "python": sys.version.split()[0],
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _memory() -> dict[str, float]:
    """Milliseconds to fill 64 MB of the CPU's memory that are new, and that were used before."""

    def new() -> Tensor:
        return torch.ones(1 << 24)

    used = new()
    return {
        "new_ms": 1e3 * seconds(new, repeats=3),
        "kept_ms": 1e3 * seconds(lambda: used.fill_(1.0), repeats=3),
    }


def _try_backend(name: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=generator).to(device) for _ in range(3))
    mask = Causal() & SlidingWindow(20)
    row: dict[str, Any] = {"name": name, "state": "works", "why": None, "error": None}
    # The one place that catches everything: whatever is broken here is what doctor is to say.
    try:
        chosen = plan(q, k, v, mask=mask, backend=name)
    except ValueError as error:
        return {**row, "state": "unavailable", "why": str(error).partition("this call: ")[2]}
    except Exception as error:
        return {**row, "state": "fails", "why": _first_line(error)}
    if name in COMPILED and not compiled:
        return {**row, "state": "not run", "why": "it compiles first; --compiled runs it too"}
    try:
        out = execute(q, k, v, chosen, False)
    except Exception as error:
        return {**row, "state": "fails", "why": _first_line(error)}
    wrong = (out.double() - attend(q, k, v, mask=mask, backend="reference").double()).abs().max()
    row["error"] = wrong.item()
    if not row["error"] <= TOLERANCE:
        row.update(state="wrong", why=f"differs from the definition by {row['error']:.1e}")
    return row


def _first_line(error: Exception) -> str:
    said = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {said}"


_CALLS: dict[str, dict[str, Any]] = {
    "dense causal prefill, N=4096": {"mask": Causal()},
    "window of 256, N=4096": {"mask": Causal() & SlidingWindow(255)},
    "window of 1024 and 4 sinks, N=4096": {"mask": Causal() & (SlidingWindow(1023) | Sinks(4))},
    "decoding one token over 8192": {"mask": Causal(), "n": 1, "m": 8192},
    "small, float64": {"mask": Causal(), "n": 64, "m": 64, "dtype": torch.float64},
    "grouped heads 8:2, bfloat16, N=4096": {
        "mask": Causal(),
        "kv_heads": 2,
        "dtype": torch.bfloat16,
    },
}


def _typical(
    words: str,
    device: torch.device,
    *,
    mask: Mask,
    n: int = 4096,
    m: int = 4096,
    kv_heads: int = 8,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    def tensor(heads: int, length: int) -> Tensor:
        # One number seen from everywhere: planning looks at shapes, so none is stored.
        return torch.zeros((), dtype=dtype, device=device).expand(1, heads, length, 64)

    k = tensor(kv_heads, m)
    chosen = plan(tensor(8, n), k, k, mask=mask)
    return {
        "call": words,
        "backend": chosen.backend,
        "reason": chosen.reason,
        "density": chosen.density,
    }
