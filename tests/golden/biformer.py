"""Adapter of `biformer.npz`: the authors' module `nchwBRA`, its output and its choice of regions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.biformer import BiLevelRoutingAttention

from . import cases

OUTPUTS = ("y", "region_idx_sorted")


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`y` (B, C, Y, X) and `region_idx_sorted` (B, R, topk)."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, meta in cases(case):
        config = meta.get("config", meta)
        x = torch.from_numpy(np.asarray(arrays["x"])).double()
        weights = {
            name.removeprefix("param."): torch.from_numpy(np.asarray(array)).double()
            for name, array in arrays.items()
            if name.startswith("param.")
        }
        lepe = weights.get("lepe.weight")
        scale = config.get("scale")
        module = BiLevelRoutingAttention(
            x.shape[1],
            int(config["num_heads"]),
            int(config["n_win"]),
            int(config["topk"]),
            0 if lepe is None else int(config.get("side_dwconv", lepe.shape[-1])),
            # A text names the default, a number replaces it.
            None if scale is None or isinstance(scale, str) else float(scale),
        ).double()
        module.load_state_dict(weights)
        with torch.no_grad():
            outputs = {"y": module(x), "region_idx_sorted": module.regions(x)}
        found |= {prefix + name: y.numpy() for name, y in outputs.items() if name in arrays}
    return found
