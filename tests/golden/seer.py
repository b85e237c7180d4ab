"""Adapter of `seer.npz`: the authors' gate and masks; target, loss and output made densely."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.core.attend import attend
from regard.core.masks import Causal
from regard.core.select import block_allowed
from regard.sparse.seer import SeerGate, rotate
from regard.sparse.seer_choice import gate_choice, gate_select
from regard.sparse.seer_distil import seer_loss, seer_target

from . import cases

OUTPUTS = (
    "gate_probs",
    "gate_logits",
    "mask_ratio",
    "mask_threshold",
    "ground_truth",
    "loss",
    "out_threshold",
)
RTOL = 1e-4
_Q, _K = "param.mask_linear_q.weight", "param.mask_linear_k.weight"


def _gate(arrays: dict[str, Tensor], config: dict[str, Any]) -> SeerGate:
    gate = SeerGate(
        config["num_q_head"],
        config["num_k_head"],
        config["head_dim"],
        block=config["block_size"],
        gate_dim=config["gate_hidden"],
        project_q=_Q in arrays,
    ).to(arrays[_K].dtype)
    weights = {"key_weight": arrays[_K]}
    if _Q in arrays:
        weights["query_weight"] = arrays[_Q]
    gate.load_state_dict(weights)
    return gate


def _check_logits(z: Tensor, want: Tensor) -> None:
    """The errors of a file count relative to the largest entry, which is the -1e9 of blocks of the
    future: those that a query may see are held to their own size."""
    seen = want > -1e8
    gap = (z - want)[seen].abs().max()
    if gap > 1e-6 + RTOL * want[seen].abs().max():
        raise ValueError(f"gate_logits: those of visible blocks differ by {gap:.2e}")


@torch.no_grad()
def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every stage, from pooled queries and keys to the block-sparse output."""
    found: dict[str, Tensor] = {}
    for prefix, raw, whole in cases(case):
        config = whole.get("config", whole)
        arrays = {name: torch.from_numpy(np.array(x)) for name, x in raw.items()}
        q, k, v = (arrays[x].transpose(1, 2) for x in "qkv")
        n, block = q.shape[2], config["block_size"]
        z = _gate(arrays, config)(q, k, angles=(arrays["block_cos"], arrays["block_sin"]))
        _check_logits(z, arrays["gate_logits"])
        rows = 2 if config.get("last_block_dense", True) else 0
        allowed = block_allowed(Causal(), n, n, block)
        at = arrays["token_cos"], arrays["token_sin"]
        turned_q, turned_k = rotate(q, *at), rotate(k, *at)
        target = seer_target(turned_q, turned_k, block)
        by_threshold = {"threshold": config["threshold"], "dense_rows": rows}
        by_ratio = {"nz_ratio": config["nz_ratio"], "dense_rows": rows}
        layout = gate_select(z, n, block=block, **by_threshold, own=False)
        outputs = {
            "gate_logits": z,
            "gate_probs": z.softmax(-1),
            "mask_ratio": gate_choice(z, allowed, **by_ratio, own=0),
            "mask_threshold": gate_choice(z, allowed, **by_threshold, own=0),
            "ground_truth": target,
            "loss": seer_loss(z, target),
            "out_threshold": attend(turned_q, turned_k, v, layout=layout),
        }
        found.update({prefix + name: value for name, value in outputs.items()})
    return {name: value.numpy() for name, value in found.items()}
