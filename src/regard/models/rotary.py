"""Queries and keys before the rotary embedding, through the model's own rotary module."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotary embedding of one attention layer.

    Most models have one axis of positions. Qwen2-VL and its kin have three (time, height, width), of
    which each turns some of the channels; text stands at the same position on all of them.

    Attributes:
        key_axes: position ids of every key of the call on every axis, ``(A, B or 1, M)``.
        n: queries; they are the last ``n`` keys.
        angles: ``(x, positions) -> (cos, sin)``, each ``(B or 1, L, D_rot)``, of positions
            ``(B or 1, L)`` (the same on all axes) or ``(A, B or 1, L)``.
        apply: the model's ``apply_rotary_pos_emb(q, k, cos, sin)``.
    """

    key_axes: Tensor
    n: int
    angles: Callable[[Tensor, Tensor], Angles]
    apply: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def axes(self) -> int:
        """A: 1, or 3 where the model was given positions on three axes."""
        return self.key_axes.shape[0]

    @property
    def query_axes(self) -> Tensor:
        """Position ids of every query on every axis, ``(A, B or 1, N)``."""
        return self.key_axes[..., self.key_axes.shape[-1] - self.n :]

    @cached_property
    def key_positions(self) -> Tensor:
        """Position id of every key, ``(B or 1, M)``, for methods that are written for one axis.

        Raises:
            ValueError: a key stands at different positions on different axes.
        """
        first = self.key_axes[0]
        if self.axes > 1 and bool((self.key_axes != first).any()):
            raise ValueError(
                f"call.rotary: positions differ between {self.axes} axes (an image?), and this method "
                "is written for one axis; use it on text, or a model whose positions have one axis"
            )
        return first

    @property
    def query_positions(self) -> Tensor:
        """Position id of every query, ``(B or 1, N)``; errors as :attr:`key_positions`."""
        return self.key_positions[:, self.key_axes.shape[-1] - self.n :]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` ``(B, H, L, D)`` rotated to ``positions`` ``(B or 1, L)`` or ``(A, B or 1, L)``."""
        cos, sin = self.angles(x, positions)
        return self.apply(x, x, cos, sin)[0]

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` ``(B, H, L, D)`` before it was rotated to ``positions``, as :meth:`rotate` takes them.

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
        key_positions: ``(A, B or 1, M)``; the last ``n`` belong to the queries. Of one axis more than
            the embedding has, the first one only counts the tokens (packed sequences).
    """
    name = type(attention).__name__
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None or not isinstance(given, tuple) or len(given) != 2:
        raise ValueError(f"call.rotary: {name} applies no rotary embedding that regard knows")
    for module in root.modules():
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        axes = _axes(module)
        places = key_positions[1:] if key_positions.shape[0] == axes + 1 > 2 else key_positions
        if places.shape[0] not in (1, axes):
            continue
        angles = _angles(module, attention)
        cos, _ = angles(given[0], places[..., places.shape[-1] - n :])
        if cos.shape[1:] == given[0].shape[1:] and torch.allclose(
            cos.expand_as(given[0]).float(), given[0].float(), atol=1e-5
        ):
            return Rotary(places, n, angles, apply)
    raise ValueError(f"call.rotary: no rotary module of {type(root).__name__} explains {name}'s")


def _axes(module: nn.Module) -> int:
    """Axes of positions that a rotary module reads: one for each section of the channels."""
    sections = getattr(module, "mrope_section", None)
    return len(sections) if isinstance(sections, (list, tuple)) else 1


def _angles(module: nn.Module, attention: nn.Module) -> Callable[[Tensor, Tensor], Angles]:
    typed = "layer_type" in inspect.signature(module.forward).parameters
    kind = getattr(attention, "layer_type", None)

    def angles(x: Tensor, positions: Tensor) -> Angles:
        if positions.dim() == 3 and positions.shape[0] == 1:
            positions = positions[0]  # a model of one axis knows no other shape
        with torch.no_grad():
            cos, sin = module(x, positions, kind) if typed else module(x, positions)
        return cos, sin

    return angles
