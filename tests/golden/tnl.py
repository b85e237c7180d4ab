"""Adapter of `tnl.npz`: the authors' layers and gated linear unit, and their kernels' example."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.linear.lightning2 import decay_slopes
from regard.linear.tnl import SGLU, TNLAttention, TNLLowRankGate

from . import cases

OUTPUTS = ("base_slopes", "nla0_out", "nla1_out", "nla2_out", "sglu_out", "example_out")
RTOL = 1e-4


def _weights(x: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: y for name, y in x.items() if name.startswith(prefix)}


def _run(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> np.ndarray:
    module.to(x.dtype).load_state_dict(weights)
    with torch.no_grad():
        out: Tensor = module.eval()(x)
    return out.numpy()


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Slopes and outputs of every layer the file has."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        heads, layers = int(config["heads"]), int(config["num_layers"])
        tokens = x["x"]
        dim = tokens.shape[-1]
        if "base_slopes" in x:
            found[prefix + "base_slopes"] = decay_slopes(heads)[:, None, None].numpy()
        for name in x:
            if not (name.startswith("nla") and name.endswith("_out")):
                continue
            layer = int(name[3 : -len("_out")])
            weights = _weights(x, f"nla{layer}.")
            module = TNLAttention(dim, heads, layer, layers, use_lrpe="lrpe.theta" in weights)
            found[prefix + name] = _run(module, weights, tokens)
            slopes = decay_slopes(heads, layer, layers)[:, None, None]
            if f"slope{layer}" in x:
                found[f"{prefix}slope{layer}"] = slopes.numpy()
        if "sglu_out" in x:
            weights = _weights(x, "sglu.")
            unit = SGLU(dim, weights["l1.weight"].shape[0])
            found[prefix + "sglu_out"] = _run(unit, weights, tokens)
        if "example_out" in x:
            weights = _weights(x, "example.")
            named = re.search(r"layer_idx=(\d+)", str(config.get("what", "")))
            layer = int(named[1]) if named else 1
            example = TNLLowRankGate(dim, heads, layer, layers)
            found[prefix + "example_out"] = _run(example, weights, tokens)
    return found
