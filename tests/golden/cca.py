"""Adapter of `cca.npz`: weights of the groups, the mask and the output, as the authors' dense path."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.cca import cca_attention, group_weights
from regard.sparse.cca_parts import CoreTokens, LocalTokens

from . import cases

OUTPUTS = ("out", "group_weights", "mask")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`out` (B, H, L, D), `group_weights` (B, H, C, g) and `mask` (L, C + L), core tokens first."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, meta in cases(case):
        config = meta.get("config", meta)
        group, window = int(config["group_size"]), int(config["window_size"])
        q, k, v = (torch.from_numpy(np.asarray(arrays[x])).double() for x in "qkv")
        n = q.shape[2]
        cores = max(0, n - window) // group
        pooled = cores * group
        pool = config.get("pool", "cca")
        weights = group_weights(q[:, :, :pooled], k[:, :, :pooled], group)
        core = CoreTokens(group, window, n - cores).dense(n, cores)
        local = LocalTokens(group, window).dense(n)
        outputs = {
            "out": cca_attention(q, k, v, group, window, pool),
            "group_weights": weights,
            "mask": torch.cat([core, local], -1),
        }
        found |= {prefix + x: y.numpy() for x, y in outputs.items() if x in arrays}
    return found
