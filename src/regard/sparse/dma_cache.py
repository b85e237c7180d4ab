"""Decoding with dynamic mask attention: keys, values, scores, and the list of what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core.layout import BlockLayout
from regard.core.masks import Mask

from .dma_mask import mask_kind, ranked_keys


@dataclass
class DynamicMaskCache:
    """What one layer keeps of one batch of sequences: every key and value, and one score a key.

    The choice does not depend on the query, so decoding carries the list of the `w` best keys along:
    the new key replaces the worst of them or is left out, O(w) a step.

    Attributes:
        k, v: `(B, Hkv, M, D)`, `(B, Hkv, M, Dv)`, `None` before the first tokens.
        delta: `(B, Hkv, M)`.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    delta: Tensor | None = None
    _kept: tuple[Tensor, Tensor, int] | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: Tensor, v: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add new tokens' keys, values and scores; all of them are returned.

        Raises:
            ValueError: another batch or other heads than before.
        """
        if self.k is None or self.v is None or self.delta is None:
            self.k, self.v, self.delta = k, v, delta
        elif self.k.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"DynamicMaskCache: k has batch and heads {tuple(k.shape[:2])}, expected "
                f"{tuple(self.k.shape[:2])}"
            )
        else:
            self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            self.delta = torch.cat([self.delta, delta], 2)
        return self.k, self.v, self.delta

    def step(self, window: int, mask: Mask | None = None, group: int = 1) -> BlockLayout | None:
        """The keys that the last token reads, as a layout of single keys.

        Args:
            window: `w`, the same at every step.
            mask: causal, with padding or not; what it says of a key must not change later.
            group: query heads a key head.

        Returns:
            `None` where there is no list to keep: no more than `w` keys, or another kind of mask.
        """
        kind, valid = mask_kind(mask)
        if self.delta is None or self.length <= window or kind != "causal":
            return None
        scores = self.delta.detach()
        if valid is not None:
            valid = valid[..., : self.length].to(scores.device)
            scores = scores.masked_fill(
                ~(valid if valid.dim() == 1 else valid[:, None]), -torch.inf
            )
        m, kept = self.length, self._kept
        if kept is not None and kept[2] == m - 1 and kept[0].shape[-1] == window:
            keys, worth = _replaced(kept[0], kept[1], scores[..., -1:], m - 1)
        else:
            keys = ranked_keys(scores)[..., :window].sort(-1).values
            worth = scores.gather(-1, keys)
        self._kept = keys, worth, m
        index = torch.where(worth > -torch.inf, keys, m).sort(-1).values
        index = index.masked_fill(index == m, -1).repeat_interleave(group, 1)[:, :, None]
        return BlockLayout(1, m, 1, 1, index, torch.zeros_like(index, dtype=torch.bool))


def _replaced(keys: Tensor, worth: Tensor, new: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """The lists with one more key and without the worst one, of equals the oldest."""
    keys = torch.cat([keys, torch.full_like(keys[..., :1], place)], -1)
    worth = torch.cat([worth, new], -1)
    # Lists are ascending, and argmin names the first of equals.
    worst = worth.argmin(-1, keepdim=True)
    stays = torch.arange(keys.shape[-1], device=keys.device) != worst
    shape = (*keys.shape[:-1], keys.shape[-1] - 1)
    return keys[stays].view(shape), worth[stays].view(shape)
