"""Adapter of `mambaout.npz`: one block, and a small network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.linear.mambaout import GatedCNNBlock, MambaOut

from . import cases

OUTPUTS = ("block_out", "net_out")


def _weights(x: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in x.items() if name.startswith(prefix)}


def _block(weights: dict[str, torch.Tensor]) -> GatedCNNBlock:
    dim, hidden = weights["fc2.weight"].shape
    convolved, _, side = weights["conv.weight"].shape[:3]
    # Half a channel more, since both sizes are cut down to whole numbers.
    block = GatedCNNBlock(dim, (hidden + 0.5) / dim, side, (convolved + 0.5) / dim)
    block.load_state_dict(weights)
    return block.eval()


@torch.no_grad()
def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`block_out` `(B, H, W, C)` and `net_out` `(B, classes)`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, _ in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        if "block_x" in x:
            found[prefix + "block_out"] = _block(_weights(x, "block."))(x["block_x"]).numpy()
        if "net_x" in x:
            weights = _weights(x, "net.")
            stages = {int(name.split(".")[1]) for name in weights if name.startswith("stages.")}
            depths = [
                1 + max(int(n.split(".")[2]) for n in weights if n.startswith(f"stages.{i}."))
                for i in sorted(stages)
            ]
            dims = [len(weights[f"stages.{i}.0.norm.weight"]) for i in sorted(stages)]
            classes, channels = len(weights["head.fc2.bias"]), x["net_x"].shape[1]
            net = MambaOut(depths, dims, classes, channels=channels)
            for i, stage in enumerate(net.stages):
                for j in range(len(stage)):
                    stage[j] = _block(_weights(weights, f"stages.{i}.{j}."))
            net.load_state_dict(weights)
            found[prefix + "net_out"] = net.eval()(x["net_x"]).numpy()
    return found
