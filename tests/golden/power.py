"""Adapter of `power.npz`: the paper's Algorithm 1 and PyTorch's attention under its mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.power import power_attention, power_mask

from . import cases

OUTPUTS = ("out", "mask")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`mask` (packed along the keys) and `out` of every case."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        q, k, v = (torch.from_numpy(np.asarray(arrays[x])) for x in "qkv")
        sizes = config["block_size"], config["window_size"]
        sinks = config.get("sink_blocks", 1)
        mask = power_mask(*sizes, sinks).dense(q.shape[2], k.shape[2])
        found[prefix + "mask"] = np.packbits(mask.numpy(), axis=-1)
        found[prefix + "out"] = power_attention(q, k, v, *sizes, sink_blocks=sinks).numpy()
    return found
