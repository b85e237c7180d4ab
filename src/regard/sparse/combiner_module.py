"""Combiner as layers: the factorised patterns, and the row-major axial form with its own row keys."""

from __future__ import annotations

from torch import Tensor, nn

from regard.core.attend import attend
from regard.core.masks import Causal
from regard.core.merge import merge

from .combiner import CombinerCache, check_options, combiner_attention, fold, unfold
from .combiner_axial import BEFORE, along

ROW_SUMMARIES = ("proj", "wsum", "none")


def _heads(name: str, dim: int, heads: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: heads must divide dim, got dim={dim} and heads={heads}")


class Combiner(nn.Module):
    """Self-attention with one of Combiner's patterns (arXiv 2107.05768).

    Args:
        dim: width of the input.
        heads: query, key and value heads, each `dim / heads` wide.
        pattern, seg, causal, running: as :func:`~regard.sparse.combiner.combiner_attention`.
        bias: whether the projections have one; the paper's have none.

    Raises:
        ValueError: `heads` does not divide `dim`, or there is no such form.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        pattern: str = "fixed",
        seg: int = 128,
        causal: bool = True,
        *,
        running: str = "max",
        bias: bool = False,
    ) -> None:
        super().__init__()
        _heads("Combiner", dim, heads)
        check_options(pattern, seg, causal, running)
        self.heads, self.pattern, self.seg = heads, pattern, seg
        self.causal, self.running = causal, running
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def new_cache(self) -> CombinerCache:
        """An empty cache for decoding; the causal fixed pattern has one.

        Raises:
            ValueError: another pattern.
        """
        if self.pattern != "fixed" or not self.causal:
            raise ValueError(
                f"Combiner: decoding needs pattern='fixed' and causal=True, got {self.pattern!r} "
                f"and {self.causal}"
            )
        return CombinerCache(self.seg)

    def forward(self, x: Tensor, cache: CombinerCache | None = None) -> Tensor:
        """`(B, N, dim)` to `(B, N, dim)`; with a cache `x` are the tokens after those in it."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            out = cache.attend(q, k, v)
        else:
            out = combiner_attention(
                q, k, v, self.pattern, self.seg, self.causal, running=self.running
            )
        projected: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return projected


def row_summary(q: Tensor, k: Tensor, v: Tensor, seg: int) -> Tensor:
    """What each token finds in its whole row of `seg` tokens, `(B, H, N, Dv)`; not causal in the row.

    Later rows take it as the value of the row's summary in that token's column.
    """
    return unfold(attend(*(fold(x, seg) for x in (q, k, v))), q.shape[2] // seg)


def rowmajor_attention(
    q: Tensor, k: Tensor, v: Tensor, seg: int, row_keys: Tensor, summary: Tensor
) -> Tensor:
    """Combiner's row-major axial form, causal: the own row up to the query, and every earlier row by
    its summary in the query's column (arXiv 2107.05768, section 4.3).

    Args:
        q, k, v: `(B, H, N, D)`, `(B, H, N, D)`, `(B, H, N, Dv)`; `seg` divides `N`.
        seg: tokens a row.
        row_keys: `(B, H, N, D)`, keys of the rows' summaries in each column.
        summary: `(B, H, N, Dv)`, their values, see :func:`row_summary`.

    Returns:
        `(B, H, N, Dv)`.

    Raises:
        ValueError: `seg` does not divide `N`.
    """
    n = q.shape[2]
    if seg < 1 or n % seg:
        raise ValueError(f"rowmajor_attention: needs whole rows, got {n} tokens for seg={seg}")
    rows = n // seg
    grids = [
        x.unflatten(2, (rows, seg)).permute(0, 2, 1, 3, 4) for x in (q, k, v, row_keys, summary)
    ]
    own = along(grids[0], (grids[1], grids[2]), 3, Causal())
    earlier = along(grids[0], (grids[3], grids[4]), 1, BEFORE)
    return merge([own, earlier])[0].permute(0, 2, 1, 3, 4).flatten(2, 3)


class CombinerRowMajor(nn.Module):
    """Self-attention with the row-major axial form, causal.

    Args:
        dim: width of the input.
        heads: heads, each `dim / heads` wide.
        seg: tokens a row.
        keys: where the keys of the rows' summaries come from: `"proj"` (the paper's) projects the
            summary, adds the input, normalises and projects again; `"wsum"` weighs the row's keys as
            the summary weighs its values; `"none"` takes the key of the token above.
        bias: whether the projections have one.

    Raises:
        ValueError: `heads` does not divide `dim`, `seg` below 1, or an unknown `keys`.
    """

    def __init__(
        self, dim: int, heads: int, seg: int = 128, keys: str = "proj", *, bias: bool = False
    ) -> None:
        super().__init__()
        _heads("CombinerRowMajor", dim, heads)
        check_options("axial", seg, True, "max")
        if keys not in ROW_SUMMARIES:
            raise ValueError(
                f"CombinerRowMajor: keys must be one of {', '.join(ROW_SUMMARIES)}, got {keys!r}"
            )
        self.heads, self.seg, self.keys = heads, seg, keys
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        if keys == "proj":
            self.row_out, self.row_key = (nn.Linear(dim, dim, bias=bias) for _ in range(2))
            self.row_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` to `(B, N, dim)`; `seg` divides `N`."""
        if x.shape[1] % self.seg:
            raise ValueError(
                f"CombinerRowMajor: needs whole rows, got {x.shape[1]} tokens for seg={self.seg}"
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        summary = row_summary(q, k, v, self.seg)
        if self.keys == "proj":
            mixed = self.row_out(summary.transpose(1, 2).flatten(2)) + x
            keys = self.row_key(self.row_norm(mixed))
            row_keys = keys.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        else:
            row_keys = row_summary(q, k, k, self.seg) if self.keys == "wsum" else k
        out = rowmajor_attention(q, k, v, self.seg, row_keys, summary)
        projected: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return projected
