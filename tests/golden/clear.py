"""Adapter of `clear.npz`: the authors' attention processors on a single-stream block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.clear import Clear
from regard.patterns.clear_module import ClearAttention

from . import cases

OUTPUTS = ("out_image", "out_text_tail", "image_mask")


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name: `out_image`, the last rows of text `out_text_tail`, the packed `image_mask`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        for name, value in _one(x, config).items():
            found[prefix + name] = value
    return found


def _one(x: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, np.ndarray]:
    grid = (int(config["height"]), int(config["width"]))
    hidden, points = x["x"], grid[0] * grid[1]
    text = int(config.get("text_length", hidden.shape[1] - points))
    weight = x.get("spatial_weight")
    factor = int(config.get("down_factor", 1)) if weight is None else weight.shape[3]
    layer = ClearAttention(
        hidden.shape[-1],
        int(config["heads"]),
        config["window_size"],
        grid=grid,
        text=text,
        pool=None if weight is None else factor,
        qk_norm="norm_q.weight" in x,
        proportional=bool(config.get("proportional_attention", False)),
        bias="to_q.bias" in x,
    ).to(hidden.dtype)
    weights = {name: x[name] for name in layer.state_dict() if name in x}
    if weight is not None:
        weights["processor.spatial_weight"] = weight
    layer.load_state_dict(weights)
    with torch.no_grad():
        out = layer.eval()(hidden)
    assert isinstance(out, torch.Tensor)
    results = {"out_image": out[:, text:].numpy()}
    if "out_text_tail" in x:
        tail = x["out_text_tail"].shape[1]
        results["out_text_tail"] = out[:, text - tail : text].numpy()
    if "image_mask" in x:
        near = Clear(*grid, config["window_size"]).dense(points)
        if weight is not None:
            near = torch.cat([near, near.new_ones(points, points // factor**2)], dim=1)
        results["image_mask"] = np.packbits(near.numpy(), axis=-1)
    return results
