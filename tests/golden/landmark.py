"""Adapter of `landmark.npz`: the authors' attention block without positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.landmark import landmark_attention
from regard.sparse.landmark_layer import LandmarkAttention

from . import cases

OUTPUTS = ("probs", "y")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`y`, and `probs`: what attention gives when the values are the unit vectors."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        heads = int(config.get("config", config).get("n_head", x["q"].shape[1]))
        q, k = x["q"].double(), x["k"].double()
        unit = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
        found[prefix + "probs"] = landmark_attention(q, k, unit, x["is_mem"]).numpy()
        bias = "param.c_attn.bias" in x
        layer = LandmarkAttention(x["x"].shape[-1], heads, base=None, bias=bias).double()
        names = {"qkv": "c_attn", "out": "c_proj"}
        kinds = ("weight", "bias") if bias else ("weight",)
        layer.load_state_dict(
            {f"{a}.{kind}": x[f"param.{b}.{kind}"] for a, b in names.items() for kind in kinds}
        )
        with torch.no_grad():
            found[prefix + "y"] = layer(x["x"].double(), x["is_mem"]).numpy()
    return found
