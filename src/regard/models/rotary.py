"""Queries and keys before the rotary embedding, through the model's own rotary module."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotary embedding of one attention layer.

    Attributes:
        key_positions: position id of every key of the call, ``(B or 1, M)``.
        query_positions: position id of every query, ``(B or 1, N)``.
        angles: ``(x, position_ids) -> (cos, sin)``, each ``(B or 1, N, D_rot)``.
        apply: the model's ``apply_rotary_pos_emb(q, k, cos, sin)``.
    """

    key_positions: Tensor
    query_positions: Tensor
    angles: Callable[[Tensor, Tensor], Angles]
    apply: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` ``(B, H, L, D)`` rotated to ``positions`` ``(B or 1, L)``."""
        cos, sin = self.angles(x, positions)
        return self.apply(x, x, cos, sin)[0]

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` ``(B, H, L, D)`` before it was rotated to ``positions`` ``(B or 1, L)``.

        Some embeddings scale as well (YaRN): the inverse of ``c R`` is ``c R^T / c^2``.
        """
        cos, sin = self.angles(x, positions)
        square = cos.double().square() + sin.double().square()
        cos, sin = ((t.double() / square).to(torch.float32) for t in (cos, sin))
        return self.apply(x.float(), x.float(), cos, -sin)[0].to(x.dtype)


def find_rotary(
    root: nn.Module, attention: nn.Module, given: object, key_positions: Tensor, n: int
) -> Rotary:
    """The rotary embedding that ``attention`` of the decoder ``root`` uses.

    Args:
        given: the ``position_embeddings`` that the attention module was called with; what is found
            must reproduce them.
        key_positions: ``(B or 1, M)``; the last ``n`` belong to the queries.
    """
    name = type(attention).__name__
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None or not isinstance(given, tuple) or len(given) != 2:
        raise ValueError(f"call.rotary: {name} applies no rotary embedding that regard knows")
    current = key_positions[:, key_positions.shape[1] - n :]
    for module in root.modules():
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        angles = _angles(module, attention)
        cos, _ = angles(given[0], current)
        if cos.shape[1:] == given[0].shape[1:] and torch.allclose(
            cos.expand_as(given[0]).float(), given[0].float(), atol=1e-5
        ):
            return Rotary(key_positions, current, angles, apply)
    raise ValueError(f"call.rotary: no rotary module of {type(root).__name__} explains {name}'s")


def _angles(module: nn.Module, attention: nn.Module) -> Callable[[Tensor, Tensor], Angles]:
    typed = "layer_type" in inspect.signature(module.forward).parameters
    kind = getattr(attention, "layer_type", None)

    def angles(x: Tensor, positions: Tensor) -> Angles:
        with torch.no_grad():
            cos, sin = module(x, positions, kind) if typed else module(x, positions)
        return cos, sin

    return angles
