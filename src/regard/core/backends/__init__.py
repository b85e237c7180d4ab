"""Backends of :func:`regard.attend`: same contract, each testable alone.

Every module has ``why_not(q, k, v, call) -> str | None``, the reason why it cannot serve a call, and
``run(q, k, v, call) -> (out, lse)`` with ``out`` ``(B, H, N, Dv)`` in the dtype of ``q`` and ``lse``
``(B, H, N)`` in float32 (float64 for float64 input), or ``None`` where ``call.need_lse`` is False
and the backend does not get it for free.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from ..call import Call

NAMES = ("reference", "sdpa", "blocks", "flex", "triton")


class Backend(Protocol):
    """What a backend module offers."""

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None: ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]: ...


def backend(name: str) -> Backend:
    """The backend module of that name, imported on first use."""
    if name not in NAMES:
        raise ValueError(f"attend: unknown backend {name!r}, expected 'auto' or one of {NAMES}")
    return cast(Backend, import_module(f"{__name__}.{name}"))
