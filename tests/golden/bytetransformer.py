"""Adapter of `bytetransformer.npz`: the official PyTorch reference of a padded BERT layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.bytetransformer import PackedEncoderLayer

from . import cases

OUTPUTS = ("transformer_out",)
# The official comparison: rtol 1e-3, atol 1e-4.
RTOL, ATOL = 1e-4, 1e-5
# Ours: the official names. Kernels are stored (in, out).
_NAMES = {
    "qkv": "qkv",
    "out": "attr_output",
    "norm1": "attr_output_layernorm",
    "inner": "inter",
    "outer": "output",
    "norm2": "output_layernorm",
}


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name: `transformer_out`, padded rows 0."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        dim, hidden = x["inter_kernel"].shape
        heads = config.get("head_num") or dim // config["size_per_head"]
        layer = PackedEncoderLayer(dim, int(heads), hidden).to(x["from_tensor"].dtype).eval()
        layer.load_state_dict(_weights(x))
        with torch.no_grad():
            out = layer.padded(x["from_tensor"], x["lengths"])
        found[prefix + "transformer_out"] = out.numpy()
    return found


def _weights(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for ours, theirs in _NAMES.items():
        if ours.startswith("norm"):
            weights[f"{ours}.weight"] = x[f"{theirs}_gamma"]
            weights[f"{ours}.bias"] = x[f"{theirs}_beta"]
        else:
            weights[f"{ours}.weight"] = x[f"{theirs}_kernel"].T
            weights[f"{ours}.bias"] = x[f"{theirs}_bias"]
    return weights
