"""Adapter of `fna.npz`: NATTEN's neighbourhood attention, made by both forms of `fused_na`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.fna import fused_na

from . import cases

OUTPUTS = ("out", "lse")
RTOL, ATOL = 1e-5, 1e-5


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name: `out` and the natural log-sum-exp, of the form that is farther off."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        axes = x["q"].dim() - 3
        strides = _each(config.get("stride", 1), axes)
        if any(s != 1 for s in strides):
            raise ValueError(f"fna: has no strides, got {strides}")
        call = (
            x["q"],
            x["k"],
            x["v"],
            _each(config["kernel_size"], axes),
            _each(config.get("dilation", 1), axes),
            _each(config.get("is_causal", False), axes),
        )
        forms = [
            fused_na(*call, *tiles, scale=config.get("scale"), return_lse=True)
            for tiles in ((), ((4,) * axes, (3,) * axes))
        ]
        for name, got in zip(("out", "lse"), zip(*forms, strict=True), strict=True):
            if name in x:
                worst = max(got, key=lambda value: float((value - x[name]).abs().max()))
                found[prefix + name] = worst.numpy()
    return found


def _each(value: Any, axes: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * axes
