"""Adapter of `moa.npz`: the authors' rules, block patterns, influence and losses at every length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.sparse.moa import (
    block_influence,
    candidates,
    moa_layout,
    rule_density,
    rule_losses,
)

from . import cases

OUTPUTS = ("alpha", "beta")
RTOL = 1e-4


def replay(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Everything but the attention weights and their gradients, which are the input.

    Blocks of influence are replayed where the weights are in the file, and are input for the losses
    elsewhere.
    """
    found: dict[str, np.ndarray] = {}
    for prefix, arrays, config in cases(case):
        config = {**config, **config.get("config", {})}
        arrays = {name: torch.from_numpy(np.asarray(x)) for name, x in arrays.items()}
        block, sinks = config["block_size"], config.get("num_global_block", 1)
        here = {int(name.split("_")[-1]) for name in arrays if name.startswith("layout_")}
        lengths = [x for x in config["lengths"] if x in here]
        # The rules that survive from what the survivors are made of.
        rules = candidates(
            lengths,
            max(config["lengths"]),
            alphas=arrays["alpha"].double().unique().tolist(),
            betas=arrays["beta"].double().unique().tolist(),
        )
        alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in zip(*rules, strict=True))
        found[prefix + "alpha"], found[prefix + "beta"] = alpha.numpy(), beta.numpy()
        for length in sorted(here):
            layout = moa_layout(alpha, beta, length // block, block, sinks)
            blocks = arrays[f"block_influence_{length}"].double()
            if f"attn_{length}" in arrays:
                weights, grad = (arrays[f"{x}_{length}"].double() for x in ("attn", "grad"))
                blocks = block_influence(weights, grad, block)
                found[f"{prefix}block_influence_{length}"] = blocks.numpy()
            density = rule_density(alpha, beta, length // block, block, sinks)
            found[f"{prefix}layout_{length}"] = layout.numpy()
            found[f"{prefix}loss_{length}"] = rule_losses(blocks, layout).numpy()
            found[f"{prefix}density_kv_{length}"] = density.numpy()
    return found
