"""MoA's rules: spans `alpha + beta N` that grow with the length, as block patterns and as a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.layout import Index
from regard.core.masks import Mask

Rule = tuple[float, float]


def check_block(name: str, block: int) -> None:
    """Raise ``ValueError`` unless ``block`` is an integer of at least 1."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"{name}: block must be an integer >= 1, got {block!r}")


def candidates(
    lengths: Sequence[int],
    max_length: int | None = None,
    *,
    alphas: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    step: int = 1024,
) -> list[Rule]:
    """The rules to choose from, in order of their span at the longest length.

    A rule stays if its span is positive at the shortest length and no longer than the sequence at
    the longest profiled and at the longest of all lengths.

    Args:
        lengths: those that were profiled, in tokens.
        max_length: the longest to be served, default the longest of ``lengths``.
        alphas: default from minus the shortest length to the longest profiled, in steps of ``step``.
        betas: default nine from 0 to 1.

    Raises:
        ValueError: no lengths, one below 1, or no rule that stays.
    """
    if not lengths or min(lengths) < 1 or step < 1:
        raise ValueError(
            f"candidates: lengths and step must be positive, got {list(lengths)} and {step}"
        )
    low, high = min(lengths), max(lengths)
    longest = high if max_length is None else max_length
    low, longest = min(low, longest), max(high, longest)
    alphas = range(-low, high + 1, step) if alphas is None else alphas
    betas = [x / 8 for x in range(9)] if betas is None else betas
    kept = [
        (float(a), float(b))
        for a in alphas
        for b in betas
        if a + b * high <= high and a + b * longest <= longest and a + b * low > 0
    ]
    if not kept:
        raise ValueError(f"candidates: no span of alphas {alphas} and betas {betas} fits {lengths}")
    return sorted(kept, key=lambda rule: rule[0] + rule[1] * longest)


def band_blocks(alpha: Tensor, beta: Tensor, n_blocks: int, block: int = 64) -> Tensor:
    """Blocks of the band, the row's own among them: ``max(1, int(alpha // block + beta nb))``."""
    check_block("band_blocks", block)
    width = alpha.double().div(block, rounding_mode="floor") + beta.double() * n_blocks
    return width.trunc().long().clamp(min=1)


def moa_layout(
    alpha: Tensor | Sequence[float],
    beta: Tensor | Sequence[float],
    n_blocks: int,
    block: int = 64,
    sinks: int = 1,
) -> Tensor:
    """The profile's block pattern of each rule: sink blocks and, in addition, the latest blocks.

    Args:
        alpha, beta: ``(H,)``, tokens and share of the length.
        n_blocks: ``nb``, blocks of the sequence.
        block: tokens a block.
        sinks: leading blocks that every row reads.

    Returns:
        bool ``(H, nb, nb)``, causal.
    """
    alpha, beta = _pair("moa_layout", alpha, beta)
    band = band_blocks(alpha, beta, n_blocks, block)[:, None, None]
    row, key = torch.arange(n_blocks)[:, None], torch.arange(n_blocks)[None]
    return (key <= row) & ((key < sinks) | (row - key < band))


def rule_density(
    alpha: Tensor | Sequence[float],
    beta: Tensor | Sequence[float],
    n_blocks: int,
    block: int = 64,
    sinks: int = 1,
) -> Tensor:
    """What a rule costs: the blocks of its widest row over ``nb``, float64 ``(H,)``."""
    alpha, beta = _pair("rule_density", alpha, beta)
    band = band_blocks(alpha, beta, n_blocks, block)
    return (band + sinks).clamp(max=n_blocks).double() / n_blocks


def runtime_spans(
    alpha: Tensor | Sequence[float],
    beta: Tensor | Sequence[float],
    length: int,
    new_tokens: int = 0,
    *,
    unit: int = 64,
    least: int = 128,
) -> Tensor:
    """Slots of each head's cache, the sinks among them, int64 of the shape of ``alpha``.

    ``unit ceil(max(floor(alpha + beta N), least) / unit)`` for ``N = length + new_tokens``, at most
    ``N``.
    """
    alpha, beta = _pair("runtime_spans", alpha, beta)
    total = length + new_tokens
    span = (alpha + beta * total).trunc().clamp(min=least)
    return ((span / unit).ceil() * unit).clamp(max=total).long()


def _pair(
    name: str, alpha: Tensor | Sequence[float], beta: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (alpha, beta))
    if a.shape != b.shape:
        raise ValueError(
            f"{name}: alpha is {tuple(a.shape)}, but beta {tuple(b.shape)}, expected the same"
        )
    return a, b


@dataclass(frozen=True)
class SinkBands(Mask):
    """Sinks and a band of each head's own width, causal, in units of ``unit`` tokens.

    Query ``i`` sees key ``j <= i`` if ``j // unit < sinks`` or ``i // unit - j // unit < bands[h]``.

    Args:
        bands: units of each query head's band, its own among them.
        sinks: leading units that all see.
        unit: tokens; 1 for a cache's spans, the block for the profile's patterns.

    Raises:
        ValueError: no bands, or a size out of range.
    """

    bands: tuple[int, ...]
    sinks: int = 64
    unit: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple(int(x) for x in self.bands))
        if not self.bands or min(self.bands) < 1:
            raise ValueError(f"SinkBands: bands must be integers >= 1, got {self.bands}")
        for name, least in (("sinks", 0), ("unit", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"SinkBands: {name} must be an integer >= {least}, got {value!r}")

    @property
    def heads(self) -> int:
        return len(self.bands)

    closed = True
    constant = True

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        super().check(n, m, heads, batch)
        if n > m:
            raise ValueError(
                f"SinkBands: needs as many keys as queries at least, got {n} queries and {m} keys"
            )

    def _band(self, h: Index, device: torch.device) -> Tensor:
        return torch.tensor(self.bands, device=device)[h]

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        near = i // self.unit - j // self.unit < self._band(h, i.device)
        return (j <= i) & (near | (j // self.unit < self.sinks))

    def tile(
        self, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor, h: Index = 0, b: Index = 0
    ) -> tuple[Tensor, Tensor]:
        """Exact for every rectangle, aligned to the units or not."""
        band = self._band(h, i0.device)
        a0, a1, b0, b1 = (x // self.unit for x in (i0, i1, j0, j1))
        some = (j0 <= i1) & ((b0 < self.sinks) | ((a0 - b1).clamp(min=0) < band))
        # The farthest key that is no sink.
        far = a1 - b0.clamp(min=self.sinks)
        return some, (j1 <= i0) & ((b1 < self.sinks) | (far < band))
