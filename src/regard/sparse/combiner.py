"""Combiner: every earlier key gets weight, a few directly and the rest through summaries.

Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv 2107.05768. The
keys that query `i` may see are its direct keys and some regions `Ω`. With `q` scaled by `D^-1/2`:

    k_Ω = max_{j in Ω} k_j,   q_Ω = max_{j in Ω} q_j,   p(j|Ω) = softmax_{j in Ω}(q_Ω k_j)     (Eq. 7)
    out_i = one softmax over {q_i k_j : direct j} and {q_i k_Ω : regions Ω}, with values
            v_j and v_Ω = sum_j p(j|Ω) v_j                                                  (Eq. 6)

- `"fixed"`: direct are the own segment of `seg` tokens up to `i`; regions are all earlier segments.
  O(N (seg + N / seg) D).
- `"log"`: direct is `i`; for every bit `l` set in `i` one region of `2^l` tokens, which tile `[0, i)` as
  in a Fenwick tree. O(N log N D).
- `"axial"` (the axial mixture): tokens stand in rows of `seg`. Direct are the own row up to `i` and the
  own column above; regions are every other column above the own row, and of every earlier row what
  lies left and what lies right of the own column. They overlap: a key may be reached more than once,
  rows still sum to 1. O(N (seg + N / seg) D).

Summaries hold finished tokens only, so all are causal. The official code
(google-research/google-research, combiner/) was followed for what the paper leaves open, with these
differences. Its log levels are `ceil(log2(N - 1))`, one too few when `N - 1` is a power of two, so that
the last token sees only itself: here every bit of `N - 1` has its level. Its TensorFlow file sums in
the axial mixture where the JAX file takes the running maximum: `running="sum"` gives the former.
"""

from __future__ import annotations

from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.masks import Causal
from regard.core.merge import merge

from .cca_parts import CoreTokens, PooledCache
from .combiner_axial import axial_attention
from .combiner_log import log_attention

CARD = Card(
    key="combiner",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    arxiv="2107.05768",
    family="sparse",
    entry="regard.sparse.combiner:combiner_attention",
    definition="tests/sparse/test_combiner.py::test_is_the_factorised_definition",
    oracle="python -m tests.golden tests/golden/data/combiner.npz",
    claim="python -m benchmarks.combiner --train",
    cost="python -m benchmarks.combiner --only growth",
    note="Log levels are bit_length(N - 1), where the official code leaves one out for some N.",
)

PATTERNS = ("fixed", "log", "axial")


def summaries(q: Tensor, k: Tensor, v: Tensor, seg: int) -> tuple[Tensor, Tensor]:
    """One key and one value for every segment (Eq. 7).

    Args:
        q, k, v: `(B, H, C * seg, D)`, `(B, Hkv, C * seg, D)`, `(B, Hkv, C * seg, Dv)`.
        seg: tokens a segment.

    Returns:
        `k_Ω` and `v_Ω`, `(B, H, C, D)` and `(B, H, C, Dv)`.
    """
    b, h, n, _ = q.shape
    count = n // seg
    pooled = fold(q, seg).amax(2, keepdim=True)
    # The maximum of scaled queries is the scaled maximum, so `attend` may do the scaling.
    values = attend(pooled, fold(k, seg), fold(v, seg))
    keys = k.unflatten(2, (count, seg)).amax(3).repeat_interleave(h // k.shape[1], dim=1)
    return keys, values.view(b, count, h, v.shape[-1]).transpose(1, 2)


def fold(x: Tensor, seg: int) -> Tensor:
    """Segments as batch entries: `(B, H, C * seg, D)` to `(B * C, H, seg, D)`."""
    return x.unflatten(2, (x.shape[2] // seg, seg)).transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, count: int) -> Tensor:
    """Back from :func:`fold` of `count` segments: `(B * C, H, seg, ...)` to `(B, H, C * seg, ...)`."""
    batch = x.shape[0] // max(count, 1)
    return x.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)


def fixed_attention(q: Tensor, k: Tensor, v: Tensor, seg: int, causal: bool = True) -> Tensor:
    """The fixed pattern, see :func:`combiner_attention`."""
    n = q.shape[2]
    count, mask = n // seg, Causal() if causal else None
    own = attend(*(fold(x, seg) for x in (q, k, v)), mask=mask, return_lse=True)
    cores = summaries(q, k, v, seg)
    earlier = CoreTokens(seg, 1, n - count) if causal else None
    rest = attend(q, *cores, mask=earlier, return_lse=True)
    return merge([(unfold(own[0], count), unfold(own[1], count)), rest])[0]


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str = "fixed",
    seg: int = 128,
    causal: bool = True,
    *,
    running: str = "max",
) -> Tensor:
    """Combiner's factorised full attention over a whole sequence.

    Args:
        q: `(B, H, N, D)`, not scaled; scores carry the factor `D ** -0.5`.
        k, v: `(B, Hkv, N, D)` and `(B, Hkv, N, Dv)`.
        pattern: `"fixed"`, `"log"` or `"axial"`.
        seg: tokens a segment or a row; `"log"` does not read it.
        causal: without it (`"fixed"` only) every token sees its whole segment, and that segment's
            summary beside those of all others, as in the official code.
        running: how `"axial"` pools the queries and keys of its regions: `"max"`, or `"sum"` as the
            official TensorFlow file.

    Returns:
        `(B, H, N, Dv)`.

    Raises:
        ValueError: not as many keys as queries, `seg` that does not divide `N`, an unknown pattern,
            or one that has no such form.
    """
    check(q, k, v, pattern, seg, causal, running)
    if q.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    if pattern == "fixed":
        return fixed_attention(q, k, v, seg, causal)
    if pattern == "log":
        return log_attention(q, k, v)
    return axial_attention(q, k, v, seg, running)


def check(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, seg: int, causal: bool, running: str
) -> None:
    """Raise `ValueError` unless the arguments of :func:`combiner_attention` fit each other."""
    check_options(pattern, seg, causal, running)
    n = q.shape[2]
    if k.shape[2] != n or v.shape[2] != n:
        raise ValueError(
            f"combiner_attention: q has {n} tokens, k {k.shape[2]} and v {v.shape[2]}; expected "
            "those of the same tokens (CombinerCache decodes)"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"combiner_attention: k has {k.shape[1]} heads, which does not divide q's {q.shape[1]}"
        )
    if pattern != "log" and n % seg:
        raise ValueError(
            f"combiner_attention: pattern {pattern!r} needs whole segments, got {n} tokens for "
            f"seg={seg}"
        )


def check_options(pattern: str, seg: int, causal: bool, running: str) -> None:
    """Raise `ValueError` unless there is such a form of Combiner."""
    if pattern not in PATTERNS:
        raise ValueError(
            f"combiner_attention: pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}"
        )
    if isinstance(seg, bool) or not isinstance(seg, int) or seg < 1:
        raise ValueError(f"combiner_attention: seg must be an integer >= 1, got {seg!r}")
    if running not in ("max", "sum"):
        raise ValueError(f"combiner_attention: running must be 'max' or 'sum', got {running!r}")
    if running == "sum" and pattern != "axial":
        raise ValueError(f"combiner_attention: running='sum' is for 'axial', got {pattern!r}")
    if not causal and pattern != "fixed":
        raise ValueError(f"combiner_attention: causal=False is for 'fixed', got {pattern!r}")


class CombinerCache(PooledCache):
    """Decoding with the fixed pattern: summaries of finished segments and the running segment.

    `cache.attend(q, k, v)` appends any number of tokens and attends from them; all steps together
    give `combiner_attention(..., "fixed", seg)` of the whole sequence, whose length need not be a
    multiple of `seg`.

    Args:
        seg: tokens a segment.
    """

    def __init__(self, seg: int = 128) -> None:
        super().__init__(seg, 1, lambda q, k, v: summaries(q, k, v, seg))
