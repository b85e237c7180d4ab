"""Adapter of `longheads.npz`: the authors' layer, one prefill and then one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.longheads_cache import LongHeadsAttention
from regard.sparse.longheads_chunks import ChunkSelect

from . import cases

OUTPUTS = ("y", "chunk_features", "selected_chunks")
RTOL = 1e-3


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`y`, the features of all complete chunks and the chunks of every row that selects."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, meta in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        for name, value in _one(x, meta.get("config", meta)).items():
            found[prefix + name] = value.numpy()
    return found


@torch.no_grad()
def _one(x: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    tokens, heads = x["x"].double(), int(config["num_heads"])
    n, length = tokens.shape[1], int(config["atten_length"])
    select = ChunkSelect(int(config["window_size"]), length, int(config["begin_selective_length"]))
    base = float(x["rope_base"] if "rope_base" in x else config["rope_base"])
    kv_heads = x["param.k_proj.weight"].shape[0] * heads // x["param.q_proj.weight"].shape[0]
    layer = LongHeadsAttention(
        tokens.shape[2], heads, kv_heads=kv_heads, select=select, base=base
    ).double()
    layer.load_state_dict(
        {name: x[f"param.{name}"] for name in layer.state_dict() if f"param.{name}" in x}
    )
    prefill, cache = int(config["prefill"]), layer.new_cache()
    # The authors' prefill does not let a token beyond the start see itself; their decoding does.
    parts = [layer(tokens[:, :prefill], cache, exclude_self=True)]
    parts += [layer(tokens[:, t : t + 1], cache) for t in range(prefill, n)]
    features = cache.chunks.features
    assert features is not None

    rows = torch.arange(select.start, n)
    q = layer.q_proj(tokens).unflatten(-1, (heads, -1)).transpose(1, 2)[:, :, rows]
    inside, beyond = rows < prefill, rows >= prefill
    chosen = torch.cat(
        [
            select.choose(q[:, :, mask], features, rows[mask], exclude_self=own)
            for mask, own in ((inside, True), (beyond, False))
        ],
        2,
    )
    table = torch.full(x["selected_chunks"].shape, -1)
    table[select.start - length :, :, : chosen.shape[-1]] = chosen[0].transpose(0, 1)
    return {
        "y": torch.cat(parts, 1),
        "chunk_features": features,
        "selected_chunks": table.to(x["selected_chunks"].dtype),
    }
