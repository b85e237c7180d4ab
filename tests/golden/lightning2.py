"""Adapter of `lightning2.npz`: the authors' dense reference, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.linear.lightning2 import lightning_attention

from . import cases

OUTPUTS = ("o", "o_nodecay", "dq", "dk", "dv")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs with and without decay, and the gradients of `sum(o * w)`."""
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, _ in cases(case):
        x = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        q, k, v = (x[name].requires_grad_() for name in "qkv")
        out = lightning_attention(q, k, v, x.get("slopes"))
        found[prefix + "o"] = out.detach().numpy()
        if "o_nodecay" in x:
            found[prefix + "o_nodecay"] = lightning_attention(q, k, v).detach().numpy()
        if "w" in x:
            grads = torch.autograd.grad((out * x["w"]).sum(), (q, k, v))
            for name, grad in zip("qkv", grads, strict=True):
                found[f"{prefix}d{name}"] = grad.numpy()
    return found
