"""Adapter of `s2.npz`: the masks of the authors' library, and PyTorch's attention under them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from regard.patterns.s2 import s2_attention, s2_mask

from . import cases

OUTPUTS = ("block_mask", "dense_mask", "out")
RTOL = 1e-4

# The authors' names of the options, and ours.
_NAMES = {
    "block_size": "block",
    "vert_stride": "vert_stride",
    "num_dense_heads": "dense_heads",
    "head_sliding_offset": "offset",
    "head_sliding_step": "step",
    "homo_head": "homo",
    "causal": "causal",
    "vert_position_type": "vert_positions",
}


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`block_mask`, `dense_mask` (packed along the keys) and `out` of every case."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        q, k, v = (torch.from_numpy(np.asarray(arrays[x])) for x in "qkv")
        options = {ours: config[name] for name, ours in _NAMES.items() if name in config}
        local = config["local_blocks"]
        options["local_blocks"] = local if isinstance(local, int) else tuple(local)
        kv_heads = config.get("num_kv_heads", k.shape[1])
        with warnings.catch_warnings():
            # Some cases leave parts of the context to no head; that is what they test.
            warnings.simplefilter("ignore")
            mask = s2_mask(config["num_heads"], kv_heads=kv_heads, **options)
            out = s2_attention(q, k, v, **options)
        n, m = q.shape[2], k.shape[2]
        dense = mask.dense(n, m).view(-1, n, m)
        a, b = (-(-x // mask.block) for x in (n, m))
        at = (torch.arange(a) + (m - n) // mask.block)[:, None], torch.arange(b)[None]
        group = mask.query_heads // mask.shards
        h = torch.arange(len(dense))[:, None, None] // group
        found[prefix + "block_mask"] = mask.keeps(*at, h).expand(len(dense), a, b).numpy()
        found[prefix + "dense_mask"] = np.packbits(dense.numpy(), axis=-1)
        found[prefix + "out"] = out.numpy()
    return found
