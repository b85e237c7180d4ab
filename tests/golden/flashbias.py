"""Adapter of `flashbias.npz`: PyTorch's attention with a dense bias, against the factored form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.patterns.flashbias import alibi_factors, factored_bias_attention, sqdist_factors

from . import cases

OUTPUTS = ("out", "bias")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name: `out`, `bias`, and the factors where a formula makes them."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        for name, value in _one(x, config).items():
            found[prefix + name] = value.numpy()
    return found


def _one(x: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    q, k, v = x["q"], x["k"], x["v"]
    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    kind = config.get("kind", "spatial" if "coord_q" in x else "random")
    results: dict[str, torch.Tensor] = {}
    if kind == "alibi":
        offset, slopes = config.get("offset"), None
        if "q_bias" in x:
            first = x["q_bias"][0]
            offset = round(float(first[0, 0, 1] / first[0, 0, 0])) if offset is None else offset
            # Papers differ in the slopes where H is no power of two: there the case's own count.
            slopes = None if heads & (heads - 1) == 0 else first[:, 0, 0]
        phi_q, phi_k = alibi_factors(n, m, heads, offset, slopes=slopes)
        # The paper counts from 0; the library from the middle, which is the same bias.
        paper = alibi_factors(n, m, heads, offset, slopes=slopes, origin=0)
        results["q_bias"], results["k_bias"] = paper
    elif kind == "spatial":
        points = x["coord_q"].unsqueeze(1), x["coord_k"].unsqueeze(1), x["weight"]
        phi_q, phi_k = sqdist_factors(*points)
        results["q_bias"], results["k_bias"] = sqdist_factors(*points, center=False)
    elif kind == "random":
        phi_q, phi_k = x["q_bias"], x["k_bias"]
    else:
        raise ValueError(f"flashbias: unknown kind {kind!r}, expected random, alibi or spatial")
    for name in ("q_bias", "k_bias"):
        if name in results and name in x:
            results[name] = results[name].expand(x[name].shape)
        else:
            results.pop(name, None)
    bias = phi_q @ phi_k.transpose(-1, -2)
    results["bias"] = bias.expand(x["bias"].shape) if "bias" in x else bias
    causal = bool(config.get("causal", False))
    results["out"] = factored_bias_attention(q, k, v, phi_q, phi_k, causal=causal)
    return results
