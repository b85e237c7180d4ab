"""Adapter of `hip.npz`: the authors' search, and attention over its blocks and the window."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.core.attend import attend
from regard.sparse.hip import hip_blocks, hip_select

from . import cases

OUTPUTS = ("out", "indices", "counts", "mask")
RTOL = 1e-4


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    if config.get("block_size_k_group", 1) != 1:
        raise ValueError("keys are searched one by one, not by the extremes of groups of them")
    return {
        "mask_k": config["mask_k"],
        "block_q": config["block_size_q"],
        "block_k": config["block_size_k"],
        "window": config["sliding_window_size"],
    }


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`indices` (first tokens of blocks), `counts`, `mask` and `out` of every case."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, whole in cases(case):
        config = whole.get("config", whole)
        q, k, v = (torch.from_numpy(np.asarray(arrays[x]))[None] for x in "qkv")
        sizes = _sizes(config)
        blocks, _, _ = hip_blocks(q, k, **sizes)
        # A file holds as many slots as blocks may be kept; what follows the counted ones means
        # nothing, and is left as it came.
        slots = np.array(arrays["indices"])
        counts = (blocks[0] >= 0).sum(-1).numpy().astype(arrays["counts"].dtype)
        starts = (blocks[0] * sizes["block_k"]).numpy()
        valid = np.arange(slots.shape[-1]) < counts[..., None]
        width = starts.shape[-1]
        slots[..., :width] = np.where(valid[..., :width], starts, slots[..., :width])
        layout = hip_select(q, k, **sizes)
        found[prefix + "indices"] = slots
        found[prefix + "counts"] = counts
        found[prefix + "mask"] = layout.dense()[0].numpy()
        found[prefix + "out"] = attend(q, k, v, layout=layout)[0].numpy()
    return found
