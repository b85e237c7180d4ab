"""Adapter of `sparsifiner.npz`: the authors' `Attention` and `MaskPredictor`, both forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.sparsifiner import (
    SparsifinerAttention,
    connected_attend,
    sparse_coefficients,
)

from . import cases

OUTPUTS = (
    "y",
    "attn_mask",
    "approx_attn",
    "basis_coef",
    "masked_attn",
    "train_y",
    "train_approx_attn",
    "train_dense_attn",
)


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """All arrays of the file but `x` and the weights, by their names."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, meta in cases(case):
        config = meta.get("config", meta)
        x = torch.from_numpy(np.asarray(arrays["x"])).double()
        weights = {
            name.removeprefix("param."): torch.from_numpy(np.asarray(array)).double()
            for name, array in arrays.items()
            if name.startswith("param.")
        }
        _, n, dim = x.shape
        module = SparsifinerAttention(
            dim,
            n,
            int(config["num_heads"]),
            "qkv.bias" in weights,
            keep=float(config["attn_keep_rate"]),
            # Only the quotient is read of it, and the weights know that.
            reduce_n=_factor(n, weights["mask_predictor.proj_n"].shape[1]),
            reduce_c=int(config.get("reduce_c_factor", 2)),
            basis_topk=_optional(config.get("basis_coef_topk"), int),
            basis_thr=float(config.get("basis_threshold", 0.02)),
            coef_thr=_optional(config.get("basis_coef_threshold"), float) or 0.0,
            score_thr=_optional(config.get("attn_score_threshold"), float),
        ).double()
        module.load_state_dict(weights)
        predictor = module.mask_predictor
        with torch.no_grad():
            q, k, _ = module.heads_of(x)
            score, mask = predictor(q, k)
            trained = module.reconstruct(x)
            # Attention to the unit vectors gives the weights themselves.
            one = torch.eye(n, dtype=x.dtype).expand(*q.shape[:2], n, n)
            coefficients = predictor.coefficients(q, k)
            outputs = {
                "y": module(x),
                "attn_mask": mask,
                "approx_attn": score,
                "basis_coef": sparse_coefficients(
                    coefficients, predictor.basis_topk, predictor.coef_thr
                ),
                "masked_attn": connected_attend(q, k, one, mask),
                "train_y": trained.out,
                "train_approx_attn": trained.score,
                "train_dense_attn": trained.attention,
            }
        found |= {prefix + name: y.numpy() for name, y in outputs.items() if name in arrays}
    return found


def _optional(value: Any, kind: type) -> Any:
    return None if value is None else kind(value)


def _factor(n: int, rank: int) -> int:
    return next(factor for factor in range(1, n + 1) if n // factor == rank)
