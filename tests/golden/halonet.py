"""Adapter of `halonet.npz`: timm's `HaloAttn`, whose borders take part in the softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.halonet import HaloAttention

from . import cases

OUTPUTS = ("out",)


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name: `out` `(B, C, Y, X)`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        image = x["x"]
        weights = {name: x[name] for name in x if name.split(".")[0] in ("q", "kv", "pos_embed")}
        window, dim_head = x["pos_embed.height_rel"].shape
        heads = int(config.get("num_heads", x["q.weight"].shape[0] // dim_head))
        block = int(config.get("block_size", 8))
        module = HaloAttention(
            image.shape[1],
            x["kv.weight"].shape[0] - x["q.weight"].shape[0],
            heads,
            dim_head,
            block,
            int(config.get("halo_size", ((window + 1) // 2 - block) // 2)),
            int(config.get("stride", 1)),
            qkv_bias="q.bias" in x,
            mask_padding=False,
            scale_pos=bool(config.get("scale_pos_embed", False)),
            avg_down=bool(config.get("avg_down", False)),
        ).to(image.dtype)
        module.load_state_dict(weights)
        with torch.no_grad():
            found[prefix + "out"] = module.eval()(image).numpy()
    return found
