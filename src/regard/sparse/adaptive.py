"""Block top-k with one budget for all heads of a layer: heads that look far read more.

Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
Inference", arXiv 2407.11550, divides a layer's cache among its heads by the weights that would be
lost. Here every query block divides its own budget in the same way, among blocks whose weights are
estimated from summaries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.masks import Mask
from ..core.select import Summaries, choose_blocks, narrow
from .generic import BlockTopK, share_heads


@dataclass(frozen=True)
class AdaptiveTopK(BlockTopK):
    """The best blocks of all heads of a layer together (arXiv 2407.11550, Alg. 1).

    A query block reads ``keep`` blocks a head on average. Every head first takes ``floor`` of them by
    itself; the rest goes to the blocks with the largest share of their head's softmax, whichever head
    that is. The other arguments are those of :class:`~regard.sparse.generic.BlockTopK`, with a choice
    for each query head and bounds as summaries by default.

    Attributes:
        floor: part of ``keep`` that every head has for certain, in [0, 1]; 1 gives all heads the same.
    """

    floor: float = field(default=0.2, kw_only=True)
    share: str = field(default="head", kw_only=True)
    summary: str = field(default="bounds", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"AdaptiveTopK: floor must lie in [0, 1], got {self.floor}")

    def chosen(
        self, q: Tensor, k: Tensor, mask: Mask, state: Summaries | None, allowed: Tensor
    ) -> Tensor:
        """The blocks to read, bool ``(B, Hs, nq, nk)``."""
        scores = share_heads(self.scores(q, k, allowed, mask, state), k.shape[1], self.share)
        allowed = narrow(allowed, scores.shape[1]).expand(scores.shape)
        own = round(self.floor * self.keep)
        certain = choose_blocks(scores, allowed, own, sinks=self.sinks, recent=self.recent)
        heads, blocks = scores.shape[1], scores.shape[3]
        # Heads side by side: one row a query block.
        worth = scores.masked_fill(certain, torch.inf).transpose(1, 2).flatten(2)
        beside = allowed.transpose(1, 2).flatten(2)
        best = choose_blocks(worth[:, None], beside[:, None], heads * self.keep)
        return best[:, 0].unflatten(-1, (heads, blocks)).transpose(1, 2)
