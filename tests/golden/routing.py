"""Adapter of `routing.npz`: the PyPI form's lists, outputs, losses and updates of the centroids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.routing import routing_attention, routing_lists
from regard.sparse.routing_kmeans import commitment_loss, lloyd_step, route_norm

from . import cases

OUTPUTS = (
    "out_bidir",
    "aux_bidir",
    "q_idx_sorted_bidir",
    "k_idx_sorted_bidir",
    "out_causal_shared",
    "aux_causal_shared",
    "q_idx_sorted_causal_shared",
    "k_idx_sorted_causal_shared",
    "means_one_iter",
    "means_ema",
)
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs `(B, H, N, D)`, lists `(B, H, w, C)`, losses, and centroids `(H, C, D)`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, meta in cases(case):
        config = meta.get("config", meta)
        q, k, v, means = (
            torch.from_numpy(np.asarray(arrays[x])).double() for x in ("q", "k", "v", "means")
        )
        # The package takes the whole sequence where a cluster would be larger.
        window = min(int(config["window_size"]), q.shape[2], k.shape[2])
        near_q, near_k = (route_norm(x, "pypi") for x in (q, k))
        both = torch.cat([near_q, near_k], dim=2)
        outputs: dict[str, torch.Tensor] = {}
        for name, shared, routed in (
            ("bidir", False, (near_q, near_k)),
            ("causal_shared", True, (near_q, near_q)),
        ):
            outputs[f"out_{name}"] = routing_attention(
                q,
                k,
                v,
                means,
                window,
                causal=shared,
                form="pypi",
                self_score=float(config["self_value"]) if shared else None,
                eps=float(config["eps_scatter_mean"]),
            )
            loss = commitment_loss(near_q if shared else both, means)
            outputs[f"aux_{name}"] = float(config["commitment"]) * loss
            for side, x in zip("qk", routed, strict=True):
                lists = routing_lists(x, means, window)
                outputs[f"{side}_idx_sorted_{name}"] = lists.mT
        outputs["means_one_iter"] = lloyd_step(both, means, "pypi")
        decay = float(config["ema_decay"])
        outputs["means_ema"] = decay * means + (1 - decay) * outputs["means_one_iter"]
        found |= {prefix + x: y.numpy() for x, y in outputs.items() if x in arrays}
    return found
