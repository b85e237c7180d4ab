"""Names of BiFormer's published weights: see :mod:`regard.sparse.biformer`."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

# The authors' older module works on (B, Y, X, C) with linear layers, the newer one on (B, C, Y, X) with
# 1 x 1 convolutions. What they compute is the same.
_LEGACY = {"qkv.qkv": "qkv_linear", "wo": "output_linear"}


def rename_legacy(
    module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *context: Any
) -> None:
    """Give weights of the authors' older module (ops/bra_legacy.py) the names of the newer one.

    A hook of `nn.Module.register_load_state_dict_pre_hook`; `state` is changed in place, which is
    PyTorch's own shallow copy of what the caller passed.
    """
    for old, new in _LEGACY.items():
        for kind in ("weight", "bias"):
            found = state.pop(f"{prefix}{old}.{kind}", None)
            if found is not None:
                state[f"{prefix}{new}.{kind}"] = (
                    found[..., None, None] if kind == "weight" else found
                )
