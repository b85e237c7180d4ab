"""How far information travels: receptive fields after several layers, by boolean matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BlockLayout


def block_graph(layout: BlockLayout) -> Tensor:
    """Which query block reads which key block, bool ``(Bl, Hl, query_blocks, key_blocks)``."""
    index = layout.index
    shape = (*index.shape[:3], layout.key_blocks + 1)
    graph = torch.zeros(shape, dtype=torch.bool, device=index.device)
    # Padding goes to a last column, which is cut off.
    graph.scatter_(-1, torch.where(index < 0, layout.key_blocks, index), True)
    return graph[..., :-1]


def receptive_field(graph: Tensor, layers: int) -> Tensor:
    """Nodes whose input reaches a node through 1, 2, ..., ``layers`` layers of one pattern.

    Residual connections let every node keep what it has, whether or not it reads itself.

    Args:
        graph: bool ``(n, n)``, True where node (row) reads node (column): a dense mask, or
            :func:`block_graph` of a layout.
        layers: number of layers, at least 1.

    Returns:
        Bool ``(layers, n, n)``; ``.sum(-1)`` counts the nodes in each node's receptive field.

    Raises:
        ValueError: the graph is not square, or ``layers`` is below 1.
    """
    if graph.dim() != 2 or graph.shape[0] != graph.shape[1] or graph.dtype != torch.bool:
        raise ValueError(
            f"receptive_field: graph must be a square bool matrix, got {graph.dtype} "
            f"{tuple(graph.shape)}"
        )
    if layers < 1:
        raise ValueError(f"receptive_field: layers must be at least 1, got {layers}")
    # Counts of at most n paths are exact in float32.
    step = (graph | torch.eye(len(graph), dtype=torch.bool, device=graph.device)).float()
    fields = [step]
    for _ in range(layers - 1):
        fields.append(((step @ fields[-1]) > 0).float())
    return torch.stack(fields) > 0


def layers_to_reach(graph: Tensor, wanted: Tensor) -> int | None:
    """The fewest layers after which every pair of ``wanted`` is connected.

    Args:
        graph: bool ``(n, n)`` as for :func:`receptive_field`.
        wanted: bool ``(n, n)``, such as a causal mask.

    Returns:
        The number of layers, ``None`` if no depth connects them all.
    """
    step = receptive_field(graph, 1)[0].float()
    field, depth = step, 1
    while bool((wanted & (field == 0)).any()):
        further = ((step @ field) > 0).float()
        if torch.equal(further, field):
            return None
        field, depth = further, depth + 1
    return depth
