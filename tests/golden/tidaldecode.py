"""Adapter of `tidaldecode.npz`: the authors' Llama attention in a stack `h <- h + attn(h)`.

`y`: prefill in one dense causal call, then one token a step. `selected`: the token sets chosen at the
first selecting layer and at the correction layer, for each step and query head.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.sparse.tidaldecode_state import TidalState

from . import cases

OUTPUTS = ("y", "selected")
RTOL = 1e-4


def rotate(x: Tensor, first: int, base: float) -> Tensor:
    """Half-split rotary embedding of `x` `(B, H, N, D)` at positions `first`, `first + 1`, ..."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (torch.arange(first, first + x.shape[2])[:, None] * frequency).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _stack(arrays: dict[str, Any], config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.asarray(arrays["x"]))
    heads, kv_heads, layers = config["heads"], config["kv_heads"], config["layers"]
    start, correct = config["sparse_layer_start"], config["correction_layer"]
    named = re.search(r"base\s*([\d.e+]+)", str(config.get("rope", "")))
    base = float(named[1]) if named else 10000.0
    weights = {k: torch.from_numpy(np.asarray(w)) for k, w in arrays.items() if k[:6] == "param."}
    state = TidalState(config["top_k"], start, (correct,))
    total, prefill = x.shape[1], config["prefill"]
    cache: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * layers
    outs, sets = [], []
    for a, z in [(0, prefill), *((t, t + 1) for t in range(prefill, total))]:
        state.begin_step()
        h, chosen = x[:, a:z], []
        for layer in range(layers):
            q, k, v = (
                (h @ weights[f"param.{layer}.{name}_proj.weight"].T)
                .unflatten(-1, (count, -1))
                .transpose(1, 2)
                for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q, k = rotate(q, a, base), rotate(k, a, base)
            if a:
                k, v = torch.cat([cache[layer][0], k], 2), torch.cat([cache[layer][1], v], 2)
            cache[layer] = k, v
            out = state.attend(layer, q, k, v).transpose(1, 2).flatten(2)
            h = h + out @ weights[f"param.{layer}.o_proj.weight"].T
            if a and layer in (start, correct):
                found = torch.zeros(x.shape[0], heads, total, dtype=torch.bool)
                assert state.chosen is not None
                found[..., :z] = state.chosen.dense()[:, :, 0]
                chosen.append(found)
        outs.append(h)
        if a:
            sets.append(torch.stack(chosen))
    return torch.cat(outs, 1), torch.stack(sets)


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`y` and `selected` of every case."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        y, selected = _stack(arrays, config.get("config", config))
        found[prefix + "y"], found[prefix + "selected"] = y.numpy(), selected.numpy()
    return found
