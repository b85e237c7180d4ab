"""Which key blocks are near, from 1-bit hash codes: HyLRA's cheap estimate of its selecting layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.call import compute_dtype
from ..core.layout import BlockLayout
from ..core.masks import Causal, Mask
from ..core.select import Selector, Summaries, choose_blocks, narrow
from ..core.token_select import (
    check_tokens,
    list_chosen,
    tokens_layout,
    visible,
    visible_runs,
)

_WORD = 64
# Distances of one strip of rows: 16 MB of int64 for each step of the bit count.
_STRIP = 1 << 21


@lru_cache(maxsize=16)
def hash_planes(width: int, bits: int, seed: int) -> Tensor:
    """Orthonormal random directions ``(width, bits)`` in float64, Haar-distributed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, bits, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()


def hash_codes(x: Tensor, planes: Tensor) -> Tensor:
    """On which side of every plane ``x`` lies, packed into int64 words.

    Args:
        x: ``(..., D)``.
        planes: ``(D, bits)``.

    Returns:
        int64 ``(..., ceil(bits / 64))``.
    """
    dtype = compute_dtype(x.dtype)
    side = (x.to(dtype) @ planes.to(x.device, dtype)) > 0
    side = F.pad(side, (0, -side.shape[-1] % _WORD)).unflatten(-1, (-1, _WORD))
    shift = torch.arange(_WORD, device=x.device)
    return (side.to(torch.int64) << shift).sum(-1)


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Differing bits of packed codes ``(..., W)``, summed over the words; int64."""
    x = a ^ b
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).sum(-1)


@dataclass(frozen=True)
class HashBlocks(Selector):
    """Every row reads the ``keep`` key blocks that hold its nearest keys by Hamming distance.

    A key's distance is summed over the query heads of its key head, a block's is that of its
    nearest key. A step costs ``O(M bits / 64)`` integer operations a head; codes of old keys are
    kept in the state.

    Attributes:
        keep: blocks a row, forced ones included.
        block: keys a block.
        bits: planes, at most the heads' width.
        sinks, recent: first and last blocks that are always read.
        share: ``"kv"`` (the query heads of a key head choose together), or ``"all"`` (one choice by
            the nearest key head, as the published kernel).
        seed: of the planes.

    Source: `gsa_on_device` of ModelEngine-Group/unified-cache-management.
    """

    keep: int = 16
    block: int = 128
    bits: int = 64
    sinks: int = 1
    recent: int = 4
    share: str = "kv"
    seed: int = 0

    def __post_init__(self) -> None:
        check_tokens("HashBlocks", self.keep, self.block, self.share, self.sinks, self.recent)
        if self.share == "head":
            raise ValueError("HashBlocks: share must be 'kv' or 'all', got 'head'")
        if self.bits < 1:
            raise ValueError(f"HashBlocks: bits must be >= 1, got {self.bits}")

    def new_state(self) -> Summaries:
        """The codes of one layer's keys."""
        return Summaries(1, lambda k: hash_codes(k[..., 0, :], self._planes(k.shape[-1])))

    def _planes(self, width: int) -> Tensor:
        if self.bits > width:
            raise ValueError(
                f"HashBlocks: bits must be at most the heads' width {width}, got {self.bits}"
            )
        return hash_planes(width, self.bits, self.seed)

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, *, mask: Mask | None = None, state: Summaries | None = None
    ) -> BlockLayout:
        """See :class:`~regard.core.select.Selector`."""
        mask = Causal() if mask is None else mask
        (b, _, n, width), (_, hkv, m, _) = q.shape, k.shape
        codes_q = hash_codes(q, self._planes(width))
        codes_k = (self.new_state() if state is None else state).update(k)
        chosen = self._chosen(codes_q, codes_k, mask)
        index = list_chosen(chosen, (b, hkv if self.share == "kv" else 1, n), q.device)
        return tokens_layout(index, n, m, block=self.block, mask=mask, kv_heads=hkv)

    def _chosen(self, codes_q: Tensor, codes_k: Tensor, mask: Mask) -> Iterator[Tensor]:
        """Chosen blocks of strips of rows, bool ``(B, Hs, R, nb)``."""
        (b, h, n, _), (_, hkv, m, _) = codes_q.shape, codes_k.shape
        j = torch.arange(m, device=codes_k.device)[None]
        strip = max(1, _STRIP // max(1, b * h * m))
        for first in range(0, n, strip):
            part = codes_q[:, :, first : first + strip]
            i = torch.arange(first, first + part.shape[2], device=j.device)[:, None] + m - n
            allowed = visible(mask, i, j)
            grouped = part.unflatten(1, (hkv, h // hkv))[:, :, :, :, None]
            far = hamming(grouped, codes_k[:, :, None, None]).sum(2).double()
            if self.share == "all":
                far = far.amin(1, keepdim=True)
            # A key that the row may not see brings its block no nearer.
            far = far.masked_fill(~narrow(allowed, far.shape[1]), torch.inf)
            far = F.pad(far, (0, -m % self.block), value=torch.inf)
            near = -far.unflatten(-1, (-1, self.block)).amin(-1)
            yield choose_blocks(
                near,
                visible_runs(allowed, self.block),
                self.keep,
                sinks=self.sinks,
                recent=self.recent,
            )
