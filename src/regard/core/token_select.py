"""The best keys of every single query row: exact top-k tokens, or runs of tokens.

Rows choose from their whole row of scores, which passes by in strips: quadratic time, linear memory.
Decoding with shared positions (TidalDecode, HyLRA) selects so; and it bounds every selector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bias import Bias
from .call import compute_dtype
from .layout import BlockLayout, head_batch_index, pack_lists
from .masks import Causal, Mask
from .select import Selector, choose_blocks, narrow

SHARES = ("head", "kv", "all")

# Scores of one strip of rows: 16 MB of float32.
_STRIP = 1 << 22


def key_mass(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | None = None,
    block: int = 1,
    share: str = "head",
    scale: float | None = None,
    bias: Bias | None = None,
    rows: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The attention mass of every run of ``block`` keys, row by row, in strips of rows.

    Args:
        q, k: ``(B, H, N, D)``, the last ``N`` of ``M`` positions, and ``(B, Hkv, M, D)``.
        mask: where a query may look, by default causal.
        block: keys a run; the last one may be short.
        share: whose weights are summed: ``"head"`` (each query head for itself), ``"kv"`` (the query
            heads of a key head), ``"all"``.
        scale: factor on the scores, default ``D ** -0.5``.
        bias: additive score term.
        rows: only the last so many rows (default all).

    Yields:
        ``(mass, allowed)`` of consecutive strips of ``R`` rows: softmax weights summed over the run
        and the heads, ``(B, Hs, R, nb)`` in float32 (float64 for float64 input), 0 in rows that may
        see nothing; and whether any key of the run may be seen, ``(1 or B, 1 or H, R, nb)``.
    """
    for scores, allowed in _strips(q, k, mask, scale, bias, rows):
        weights = scores.softmax(-1).nan_to_num(0.0)
        yield _runs(_summed(weights, k.shape[1], share), block), visible_runs(allowed, block)


def _strips(
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    scale: float | None,
    bias: Bias | None,
    rows: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores ``(B, H, R, M)`` with ``-inf`` where nothing may be seen, and the mask of the strip."""
    mask = Causal() if mask is None else mask
    (b, h, n, d), (_, hkv, m, _) = q.shape, k.shape
    mask.check(n, m, h, b)
    q, k = q.to(compute_dtype(q.dtype)), k.to(compute_dtype(k.dtype))
    q = q * (d**-0.5 if scale is None else scale)
    each_h = torch.arange(h, device=q.device).view(1, -1, 1, 1)
    each_b = torch.arange(b, device=q.device).view(-1, 1, 1, 1)
    j = torch.arange(m, device=q.device)[None]
    strip = max(1, _STRIP // max(1, b * h * m))
    for first in range(0 if rows is None else max(n - rows, 0), n, strip):
        part = q[:, :, first : first + strip]
        size = part.shape[2]
        i = torch.arange(first, first + size, device=q.device)[:, None] + m - n
        # The heads of a group are rows of one product: broadcasting would copy the keys for each.
        scores = (part.reshape(b, hkv, h // hkv * size, d) @ k.mT).view(b, h, size, m)
        if bias is not None:
            scores = scores + bias.scores(i, j, each_h, each_b).to(scores.dtype)
        allowed = visible(mask, i, j)
        yield scores.masked_fill(~allowed, -torch.inf), allowed


def visible(mask: Mask, i: Tensor, j: Tensor) -> Tensor:
    """What rows at positions ``i`` ``(R, 1)`` see of keys ``j`` ``(1, M)``, ``(Bl, Hl, R, M)``."""
    h, b = head_batch_index(mask, i.device)
    allowed = mask.allows(i, j, h, b)
    allowed = allowed[(None,) * (4 - allowed.dim())]
    return allowed.expand(*allowed.shape[:2], i.shape[0], j.shape[1])


def _summed(weights: Tensor, kv_heads: int, share: str) -> Tensor:
    if share == "head":
        return weights
    if share == "all":
        return weights.sum(1, keepdim=True)
    grouped: Tensor = weights.unflatten(1, (kv_heads, -1))
    return grouped.sum(2)


def _runs(x: Tensor, block: int) -> Tensor:
    if block == 1:
        return x
    runs: Tensor = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return runs.sum(-1)


def visible_runs(allowed: Tensor, block: int) -> Tensor:
    """Whether any key of a run is visible, ``(..., nb)`` from ``(..., M)``."""
    if block == 1:
        return allowed
    runs: Tensor = F.pad(allowed, (0, -allowed.shape[-1] % block)).unflatten(-1, (-1, block))
    return runs.any(-1)


@torch.no_grad()
def top_tokens(
    q: Tensor,
    k: Tensor,
    keep: int,
    *,
    mask: Mask | None = None,
    block: int = 1,
    share: str = "head",
    sinks: int = 0,
    recent: int = 0,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Tensor:
    """The ``keep`` keys (or runs of keys) of every row with the largest attention weights.

    What the mask forbids is out before the choice; a row that may see fewer keys takes them all. Of
    equal ones the earlier wins. Forced keys count towards ``keep``.

    Args:
        q, k: ``(B, H, N, D)``, the last ``N`` of ``M`` positions, and ``(B, Hkv, M, D)``.
        keep: keys a row; runs a row where ``block > 1``.
        mask: where a query may look, by default causal.
        block: keys a run.
        share: heads that choose together, by the sum of their weights: ``"head"`` (each for itself),
            ``"kv"`` (the query heads of a key head), ``"all"``.
        sinks, recent: how many of the first and of the last visible runs are forced; ``recent=1``
            with ``block=1`` is a row's own token.
        scale, bias: as for :func:`regard.attend`.

    Returns:
        int64 ``(B, Hs, N, K)``, ascending ids of runs, padded with -1; ``Hs`` is ``H``, ``Hkv`` or 1.

    Raises:
        ValueError: a size or a name is not one of those above.
    """
    check_tokens("top_tokens", keep, block, share, sinks, recent)
    n = q.shape[2]
    heads = {"head": q.shape[1], "kv": k.shape[1], "all": 1}[share]
    if share == "head" and block == 1:
        # One head's own softmax does not change the order.
        strips = _strips(q, k, mask, scale, bias, None)
    else:
        strips = key_mass(q, k, mask=mask, block=block, share=share, scale=scale, bias=bias)
    parts = [_lists(worth, allowed, keep, sinks, recent) for worth, allowed in strips]
    return _joined(parts, (q.shape[0], heads, n), q.device)


def _lists(worth: Tensor, allowed: Tensor, keep: int, sinks: int, recent: int) -> Tensor:
    """The best of each row as a list ``(B, Hs, R, K)``: ascending, padded with -1."""
    if keep < (runs := worth.shape[-1]):
        seen = narrow(allowed, worth.shape[1])
        level = worth.masked_fill(~seen, -torch.inf)
        if sinks or recent:
            first = torch.arange(runs, device=worth.device) < sinks
            last = seen.flip(-1).cumsum(-1).flip(-1) <= recent
            level = level.masked_fill(seen & (first | last), torch.inf)
        values, places = level.topk(keep + 1, dim=-1)
        edge, next_one = values[..., -2], values[..., -1]
        # The quick way does not say which of equals it takes, nor does it take more than it is told.
        if not bool(((edge == next_one) & (next_one > -torch.inf)).any()):
            real = values[..., :-1] > -torch.inf
            index = torch.where(real, places[..., :-1], runs).sort(-1).values
            return index.masked_fill(index == runs, -1)
    chosen = choose_blocks(worth, allowed, keep, sinks=sinks, recent=recent)
    b, heads, rows, _ = chosen.shape
    return list_chosen([chosen], (b, heads, rows), worth.device)


def list_chosen(strips: Iterable[Tensor], shape: tuple[int, int, int], device: Any) -> Tensor:
    """Lists of what is chosen, int64 ``(B, Hs, N, K)``: ascending ids, padded with -1.

    Args:
        strips: consecutive rows, bool ``(B, Hs, R, nb)`` each.
        shape: ``(B, Hs, N)``.
    """
    parts = []
    for chosen in strips:
        line, run = chosen.flatten(0, 2).nonzero().unbind(-1)
        index, width = pack_lists(line, run, chosen.shape[:3].numel())
        parts.append(index.view(*chosen.shape[:3], width))
    return _joined(parts, shape, device)


def _joined(parts: list[Tensor], shape: tuple[int, int, int], device: Any) -> Tensor:
    """Lists of consecutive rows as one tensor, as wide as the longest."""
    widths = [int((part >= 0).sum(-1).max()) if part.numel() else 0 for part in parts]
    width = max(widths, default=0)
    parts = [
        F.pad(part[..., :own], (0, width - own), value=-1)
        for part, own in zip(parts, widths, strict=True)
    ]
    empty = torch.empty(*shape, 0, dtype=torch.int64, device=device)
    return torch.cat(parts, 2) if parts else empty


def check_tokens(
    name: str, keep: int, block: int, share: str, sinks: int = 0, recent: int = 0
) -> None:
    """Raise ``ValueError`` unless these are settings of :func:`top_tokens`."""
    least = {"keep": (keep, 1), "block": (block, 1), "sinks": (sinks, 0), "recent": (recent, 0)}
    for field, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: {field} must be an integer >= {low}, got {value!r}")
    if share not in SHARES:
        raise ValueError(f"{name}: share must be one of {', '.join(SHARES)}, got {share!r}")


def tokens_layout(
    index: Tensor,
    n: int,
    m: int,
    *,
    block: int = 1,
    mask: Mask | None = None,
    kv_heads: int = 1,
) -> BlockLayout:
    """The layout that reads the listed keys, ``mask`` (``None`` means causal) applied inside.

    Args:
        index: from :func:`top_tokens`: each row of each list ascending, -1 behind.
        n, m: numbers of queries and keys.
        block: keys a run.
        kv_heads: one list for all heads is written so many times: such lists are gathered, where a
            single one would be read as stretches of keys.
    """
    mask = Causal() if mask is None else mask
    heads = mask.heads or 1
    if index.shape[1] == 1:
        index = index.expand(-1, kv_heads, -1, -1)
    if index.shape[1] not in (1, heads) and heads % index.shape[1] == 0:
        # A choice that a group shares, under a mask that differs within the group.
        index = index.repeat_interleave(heads // index.shape[1], 1)
    plain = torch.zeros_like(index, dtype=torch.bool)
    return BlockLayout(n, m, 1, block, index, plain).under(mask)


@dataclass(frozen=True)
class TopTokens(Selector):
    """Every row reads the ``keep`` keys with its largest weights: :func:`top_tokens` as a selector.

    It looks at all keys before it reads few, so that it saves reading values and nothing else; what
    other layers or steps reuse costs them nothing.

    Attributes:
        keep: keys a row; runs where ``block > 1``.
        block: keys a run.
        share: heads that choose together: ``"head"``, ``"kv"`` or ``"all"``.
        sinks, recent: first and last visible runs that are always read; they count towards ``keep``.
    """

    keep: int = 256
    block: int = 1
    share: str = "head"
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        check_tokens("TopTokens", self.keep, self.block, self.share, self.sinks, self.recent)

    def select(
        self, q: Tensor, k: Tensor, *, mask: Mask | None = None, state: Any = None
    ) -> BlockLayout:
        """See :class:`~regard.core.select.Selector`; nothing is kept between steps."""
        index = top_tokens(
            q,
            k,
            self.keep,
            mask=mask,
            block=self.block,
            share=self.share,
            sinks=self.sinks,
            recent=self.recent,
        )
        n, m, kv_heads = q.shape[2], k.shape[2], k.shape[1]
        return tokens_layout(index, n, m, block=self.block, mask=mask, kv_heads=kv_heads)
