"""Adapter of `combiner.npz`: outputs and matrices of the official code, `(B, N, H, D)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.combiner import combiner_attention
from regard.sparse.combiner_probs import combiner_probs

from . import cases

OUTPUTS = ("out_fixed", "probs_fixed", "out_log", "probs_log", "out_axial", "out_axial_cumsum")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """`out_*` `(B, N, H, D)` and `probs_*` `(B, H, N, N)` of every pattern that the case holds."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, meta in cases(case):
        seg = int(meta.get("config", meta)["seg_len"])
        tensors = {x: torch.from_numpy(np.asarray(arrays[x])).double() for x in "qkv"}
        q, k, v = (tensors[x].transpose(1, 2) for x in "qkv")
        for name in OUTPUTS:
            if name not in arrays:
                continue
            kind, pattern, *rest = name.split("_")
            # the log outputs are those of the first tokens alone
            n = arrays[name].shape[1 if kind == "out" else 2]
            first = [x[:, :, :n] for x in (q, k, v)]
            if kind == "out":
                running = "sum" if rest else "max"
                value = combiner_attention(*first, pattern, seg, running=running).transpose(1, 2)
            else:
                value = combiner_probs(*first[:2], pattern, seg)
            found[prefix + name] = value.numpy()
    return found
