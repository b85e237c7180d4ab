"""Adapter of `dma.npz`: the `DogeAttention` of transformers, from its parameters and input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from regard import attend
from regard.sparse.dma import DynamicMaskAttention, dynamic_mask

from . import cases

OUTPUTS = ("delta", "y", "attn")
RTOL = 1e-4


def _module(arrays: dict[str, Any], config: dict[str, Any]) -> DynamicMaskAttention:
    parameters = {
        name.removeprefix("param."): torch.from_numpy(np.asarray(value)).double()
        for name, value in arrays.items()
        if name.startswith("param.")
    }
    module = DynamicMaskAttention(
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["keep_window_size"],
        qk_norm="q_norm.weight" in parameters,
        head_dim=parameters["q_proj.weight"].shape[0] // config["num_attention_heads"],
        bias="q_proj.bias" in parameters,
        eps=config.get("rms_norm_eps", 1e-6),
    ).double()
    module.load_state_dict(parameters)
    return module


@torch.no_grad()
def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`delta`, `y` and the weights `attn` of every case."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        config = {**config, **config.get("config", {})}
        x, cos, sin = (
            torch.from_numpy(np.asarray(arrays[name])).double() for name in ("x", "cos", "sin")
        )
        module = _module(arrays, config)
        found[prefix + "y"] = module(x, cos, sin).numpy()
        q, k, v = module.project(x, cos, sin)
        delta = module.delta(v)
        found[prefix + "delta"] = delta.numpy()
        # Values that are unit vectors read the weights out.
        group, m = module.heads // module.kv_heads, k.shape[2]
        units = torch.eye(m, dtype=x.dtype).expand(*k.shape[:2], m, m)
        wide_q = F.pad(q * module.head_dim**-0.5, (0, 1), value=1.0)
        wide_k = torch.cat([k, delta[..., None]], -1)
        mask = dynamic_mask(delta, module.window, group=group)
        found[prefix + "attn"] = attend(wide_q, wide_k, units, mask=mask, scale=1.0).numpy()
    return found
