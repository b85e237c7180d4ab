"""Adapter of `radial.npz`: the block maps of the official code."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.patterns.radial import keep_by_distance, radial_block_map, width_by_distance

from . import cases

OUTPUTS = ("block_mask", "window_by_dist", "keep_by_dist")
RTOL = 0.0
ATOL = 0.0


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`block_mask`, `window_by_dist` and `keep_by_dist` of every case, exactly."""
    found: dict[str, np.ndarray] = {}
    for prefix, _, config in cases(case):
        f, s = config["num_frame"], config["token_per_frame"]
        block, decay = config["block_size"], config["decay_factor"]
        blocks = radial_block_map(
            f,
            s,
            text=config["text_tokens"],
            block=block,
            decay_factor=decay,
            variant=config["model_type"],
        )
        found[prefix + "block_mask"] = blocks.numpy()
        widths = width_by_distance(f, s, block, decay).float()
        found[prefix + "window_by_dist"] = widths.numpy()
        found[prefix + "keep_by_dist"] = keep_by_distance(f, s).numpy()
    return found
