"""Adapter of `hyper.npz`: hashes, and both forms with the file's directions and samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.hyper import angular_lsh, hyper_attention

from . import cases

OUTPUTS = (
    "hash_q",
    "hash_k",
    "out_noncausal",
    "lse_noncausal",
    "out_causal",
    "lse_causal",
)
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Hashes `(B, H, N)`, outputs `(B, H, N, D)` and log-sum-exps `(B, H, N, 1)`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, meta in cases(case):
        config = meta.get("config", meta)
        q, k, v, proj = (
            torch.from_numpy(np.asarray(arrays[x])) for x in ("q", "k", "v", "proj_dir")
        )
        proj = proj.reshape(proj.shape[-2:])
        outputs: dict[str, torch.Tensor] = {
            f"hash_{name}": angular_lsh(x, proj) for name, x in (("q", q), ("k", k))
        }
        for form in ("noncausal", "causal"):
            outputs[f"out_{form}"], lse = hyper_attention(
                q,
                k,
                v,
                block=int(config["block_size"]),
                samples=int(config["sample_size"]),
                proj=proj,
                min_len=int(config["min_seq_len"]),
                causal=form == "causal",
                scale=config.get("scale"),
                sampled=_sets(arrays, f"sampled_{form}"),
                # The authors' float32 path, which made the file, hands this mask on and forgets it.
                exclude_own=bool(config.get("exclude_own", False)),
                return_lse=True,
            )
            outputs[f"lse_{form}"] = lse[..., None]
        found |= {prefix + x: y.numpy() for x, y in outputs.items() if x in arrays}
    return found


def _sets(arrays: dict[str, Any], name: str) -> list[torch.Tensor]:
    """The sets called `name`, or `name_0`, `name_1`, ... in their order."""
    numbered = [x for x in arrays if x.startswith(name + "_")]
    numbered.sort(key=lambda x: int(x.rsplit("_", 1)[1]))
    found = numbered or [name] * (name in arrays)
    return [torch.from_numpy(np.asarray(arrays[x])) for x in found]
