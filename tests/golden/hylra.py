"""Adapter of `hylra.npz`: the authors' offline profile and its dynamic programme (class RALS).

`K` `(Hkv, L, M, 1, D)` and `Q` `(Hkv, L, steps, G, D)`; step `t` uses the first `M - steps + 1 + t`
keys.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from regard.core.token_select import key_mass
from regard.sparse.hylra_plan import best_reuse, densest, merged_overlap
from regard.sparse.hylra_profile import (
    chunk_density,
    chunk_overlap,
    layer_density,
    merge_heads,
    top_chunks,
)

from . import cases

OUTPUTS = ("hash_ratio", "overlap", "merged", "rollback", "policy", "objective")
RTOL = 1e-5


def _one(arrays: dict[str, Any], config: dict[str, Any]) -> dict[str, np.ndarray]:
    k, q = (torch.from_numpy(np.asarray(arrays[name])) for name in "KQ")
    k = k[:, :, :, 0].transpose(0, 1)  # (L, Hkv, M, D), the layers as a batch
    q = q.permute(1, 0, 3, 2, 4).flatten(1, 2)  # (L, Hkv * G, steps, D)
    m, steps, chunk = k.shape[2], q.shape[2], config["chunk_size"]
    mass = torch.cat([mass for mass, _ in key_mass(q, k, block=chunk, share="kv")], 2)
    chunks = torch.arange(m - steps, m) // chunk + 1
    density = chunk_density(mass, chunks)
    sizes = (config[name] // chunk for name in ("preserved_tokens", "sink", "recent"))
    overlap = chunk_overlap(top_chunks(mass, chunks, *sizes))
    full = densest(layer_density(density).tolist(), config["sparsity"])
    merged = merged_overlap(merge_heads(overlap), full)
    layers, ratio = len(merged), config.get("computed_ratio", 0.3)
    usual = math.ceil(layers * config["sparsity"] * ratio) + len(full)
    sources, low, total = best_reuse(merged, config.get("max_changes", usual))
    return {
        "hash_ratio": density.permute(1, 2, 0).numpy(),
        "overlap": overlap.numpy(),
        "merged": np.array(merged),
        "rollback": np.array(full),
        "policy": np.array([-1 if i == j else i for j, i in enumerate(sources)]),
        "objective": np.array([low, total]),
    }


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """The profile, the merged overlaps and the policy of every case."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        for name, value in _one(arrays, config.get("config", config)).items():
            found[prefix + name] = value
    return found
