"""Adapter of `dinat.npz`: natten 0.17.5's `NeighborhoodAttention2D` with its own weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.dinat import DilatedNeighborhoodAttention

from . import cases

OUTPUTS = ("out",)
RTOL, ATOL = 1e-5, 1e-5


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name: `out`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        image = x.pop("x")
        x.pop("out", None)
        module = DilatedNeighborhoodAttention(
            image.shape[-1],
            int(config["num_heads"]),
            _pair(config["kernel_size"]),
            _pair(config.get("dilation", 1)),
            rel_pos_bias="rpb" in x,
            qkv_bias="qkv.bias" in x,
            causal=_pair(config.get("is_causal", False)),
        )
        module.to(image.dtype).eval().load_state_dict(x)
        with torch.no_grad():
            found[prefix + "out"] = module(image).numpy()
    return found


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
