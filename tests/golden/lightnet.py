"""Adapter of `lightnet.npz`: flash-linear-attention's convention, the author's, and MD-LRPE."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from regard.linear.lightnet import lightnet_attention
from regard.linear.lightnet_pe import md_lrpe

from . import cases

OUTPUTS = ("o_fla", "S_fla", "o_author", "S_author", "o_bi", "md_out")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs head-last as in the file; the states are `(B, H, K, V)`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        qkv = [x[name].transpose(1, 2) for name in ("q", "k_logits", "v")]
        for name, mass, scale in (("fla", 0, None), ("author", 1, 1.0)):
            out, state = lightnet_attention(*qkv, initial_mass=mass, scale=scale, return_state=True)
            if f"o_{name}" in x:
                found[f"{prefix}o_{name}"] = out.transpose(1, 2).numpy()
            if f"S_{name}" in x:
                found[f"{prefix}S_{name}"] = state.memory.numpy()
        if "o_bi" in x:
            out = lightnet_attention(*qkv, causal=False, scale=1.0)
            found[prefix + "o_bi"] = out.transpose(1, 2).numpy()
        if "md_out" in x:
            grid = tuple(int(side) for side in config["grid"])
            special = x["md_x"].shape[2] - math.prod(grid)
            out = md_lrpe(x["md_x"], x["md_theta"], grid, special)
            found[prefix + "md_out"] = out.numpy()
    return found
