"""Adapter of `gna.npz`: NATTEN's neighbourhood attention with strides, `(B, *grid, H, D)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.neighborhood import neighborhood_attention

from . import cases

OUTPUTS = ("out", "lse")
RTOL, ATOL = 1e-5, 1e-5


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name: `out` and the natural log-sum-exp."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        axes = x["q"].dim() - 3
        own: dict[str, Any] = {}
        for name, theirs, default in (
            ("stride", "stride", 1),
            ("dilation", "dilation", 1),
            ("causal", "is_causal", False),
        ):
            own[name] = _each(config.get(theirs, default), axes)
        out, lse = neighborhood_attention(
            x["q"],
            x["k"],
            x["v"],
            _each(config["kernel_size"], axes),
            **own,
            scale=config.get("scale"),
            extra_k=x.get("additional_keys"),
            extra_v=x.get("additional_values"),
            return_lse=True,
        )
        found[prefix + "out"] = out.numpy()
        if "lse" in x:
            found[prefix + "lse"] = lse.numpy()
    return found


def _each(value: Any, axes: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * axes
