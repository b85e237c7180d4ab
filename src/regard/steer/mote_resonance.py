"""MoTE's search: which experts the prompts of one behaviour use more than the others."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..models.activations import Inputs, run
from ..models.sites import find_layers
from ..models.table import Table

Kind: TypeAlias = Literal["difference", "ratio"]


def behaviour_score(maps: Tensor, labels: Tensor, kind: Kind = "difference") -> Tensor:
    """How much more an expert is used in prompts of the behaviour, ``(L, E)``.

    Args:
        maps: ``(P, L, E)``, see :func:`routing_map`.
        labels: bool ``(P,)``: which prompts show the behaviour.
        kind: ``"difference"`` of the means ``A - B``, or their ``"ratio"`` ``(A - B) / (A + B)`` (0
            where both are).

    Raises:
        ValueError: shapes that do not fit, or a group without prompts.
    """
    if kind not in get_args(Kind):
        raise ValueError(
            f"behaviour_score: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}"
        )
    if maps.dim() != 3 or labels.shape != maps.shape[:1] or labels.dtype != torch.bool:
        raise ValueError(
            f"behaviour_score: maps must be (P, L, E) and labels bool (P,), got {tuple(maps.shape)} "
            f"and {labels.dtype} {tuple(labels.shape)}"
        )
    if bool(labels.all()) or not bool(labels.any()):
        raise ValueError("behaviour_score: labels put all prompts into one group")
    a, b = maps[labels].mean(0), maps[~labels].mean(0)
    if kind == "difference":
        return a - b
    return (a - b) / torch.where(a + b > 0, a + b, 1.0)


def resonance_table(score: Tensor, count: int | None = None) -> Table:
    """The experts by score, highest first: columns layer, expert, score."""
    return Table.of(score, ("layer", "expert"), "score").top("score", count)


@torch.no_grad()
def routing_map(model: Any, inputs: Inputs, *, counts: bool = False) -> Tensor:
    """Routing weight (or number of tokens) that each expert gets from each prompt, ``(B, L, E)``.

    Args:
        model: a transformers mixture-of-experts decoder.
        inputs: token ids ``(B, N)`` or keyword arguments; padding of ``attention_mask`` is not counted.
        counts: count tokens instead of summing weights.

    Returns:
        Sums over a prompt's tokens; layers without a router are 0. What a patch around
        it has tuned is seen.

    Raises:
        ValueError: the model has no router that is known.
    """
    routers = find_routers(model)
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask
    width = max(int(router.num_experts) for router in routers.values())
    found = torch.zeros(ids.shape[0], len(find_layers(model.get_decoder())), width)
    handles = []
    for layer, router in routers.items():

        def keep(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
            _, weights, indices = output
            value = torch.ones_like(weights) if counts else weights
            value = value.float() * real.reshape(-1, 1)
            each = value.new_zeros(value.shape[0], width).scatter_add(1, indices, value)
            found[:, layer] = each.unflatten(0, tuple(ids.shape)).sum(1).cpu()

        handles.append(router.register_forward_hook(keep))
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def find_routers(model: Any) -> dict[int, Any]:
    """The top-k router of every layer that has one, by layer.

    Raises:
        ValueError: there is none.
    """
    layers = find_layers(model.get_decoder())
    found = {at: router_in(sites.layer) for at, sites in enumerate(layers)}
    there = {at: router for at, router in found.items() if router is not None}
    if not there:
        raise ValueError(f"mote: {type(model).__name__} has no top-k router that regard knows")
    return there


def router_in(layer: nn.Module) -> Any:
    """The top-k router of a layer, or ``None``."""
    parts = ("top_k", "num_experts", "weight")
    return next((m for m in layer.modules() if all(hasattr(m, part) for part in parts)), None)
