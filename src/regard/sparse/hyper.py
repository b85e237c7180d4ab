"""HyperAttention: heavy pairs found by sorting hashes, all others estimated from sampled keys.

Han et al., "HyperAttention: Long-context Attention in Near-Linear Time", arXiv 2310.05869 (ICLR 2024).
Queries and keys are sorted by the hash of their direction; a block of sorted queries attends exactly
to the block of sorted keys in the same place, which holds most heavy pairs (Algorithm 1). The rest is
estimated from `s` keys drawn uniformly, one set for all queries of a head (Algorithms 2 and 3): drawn
keys in a query's own block are left out, the others count `M / s` times, so that the estimate of a
row's sum of exponentials is unbiased. Both parts are merged by their log-sum-exp.

Causal attention (Algorithm 4): both halves by recursion, the lower half's view of the upper half by
the above, merged.

Followed is the authors' code (insuhan/hyper-attn) with its defaults. It makes a mask for drawn keys in
the own block, which the kernels for half precision heed; its float32 path and its CUDA path forget
it and count those keys twice. Here they are left out, as in the paper; `exclude_own=False` gives the
double counting, with which the authors' float32 numbers are met. Three further differences: a ragged
last block holds fewer keys, where the code adds zero keys with weight `e^0`; the parts are merged
without the code's overflow; heads may share keys. The code ranks a hash `b` by `b ^ (b >> 1)`, which is
the Gray code of `b` and not its place in the Gray order that the paper means, so that neighbours now
and then differ in more than one bit; this is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.card import Card
from regard.core.attend import attend
from regard.core.call import compute_dtype
from regard.core.layout import BlockLayout
from regard.core.masks import Causal
from regard.core.merge import merge

CARD = Card(
    key="hyper",
    title="HyperAttention: Long-context Attention in Near-Linear Time",
    arxiv="2310.05869",
    family="sparse",
    entry="regard.sparse.hyper:hyper_attention",
    definition="tests/sparse/test_hyper.py::test_is_its_definition",
    oracle="python -m tests.golden tests/golden/data/hyper.npz",
    claim="python -m benchmarks.hyper --only planted",
    cost="python -m benchmarks.hyper --only growth",
    note="The golden numbers need exclude_own=False: the authors' float32 path forgets the mask of "
    "drawn keys in the own block, which the paper and the default here leave out.",
)

Part = tuple[Tensor, Tensor]


def angular_lsh(x: Tensor, proj: Tensor) -> Tensor:
    """Hash of the direction of each row: which side of `r` hyperplanes it lies on.

    Bit `i` is `x · proj[:, i] > 0`; of the number `b` that the bits make, first bit lowest, the code
    is `b ^ (b >> 1)`.

    Args:
        x: `(..., N, D)`.
        proj: `(D, r)`, normals of the hyperplanes, `r <= 62`. Keys and queries need the same.

    Returns:
        int64 `(..., N)` in `[0, 2 ** r)`.
    """
    if proj.dim() != 2 or proj.shape[0] != x.shape[-1] or not 1 <= proj.shape[1] <= 62:
        raise ValueError(
            f"angular_lsh: proj must be ({x.shape[-1]}, 1 to 62), got {tuple(proj.shape)}"
        )
    dtype = compute_dtype(x.dtype)
    side = x.to(dtype) @ proj.to(x.device, dtype) > 0
    number = (side.to(torch.int64) << torch.arange(proj.shape[1], device=x.device)).sum(-1)
    return number ^ (number >> 1)


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 256,
    samples: int = 256,
    proj: Tensor | None = None,
    bits: int = 7,
    min_len: int = 4096,
    causal: bool = False,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    sampled: Sequence[Tensor] | None = None,
    exclude_own: bool = True,
    return_lse: bool = False,
) -> Any:
    """Softmax attention, estimated in near-linear time.

    Exact where there is little to save: causal pieces of at most `min_len` tokens, whole attention of
    fewer than `min_len` queries, and keys that fit into one block.

    Args:
        q: `(B, H, N, D)`.
        k, v: `(B, Hkv, M, D)` and `(B, Hkv, M, Dv)`; `Hkv` divides `H`.
        block: sorted keys a block. There are as many query blocks, of `block` queries where `N` makes
            as many, else of `ceil(N / blocks)`. 0 leaves the blocks out: samples only.
        samples: keys drawn, with replacement. 0 leaves them out: blocks only, a lower bound of the
            row's sum.
        proj: directions of the hash, `(D, r)`, the same for all heads; drawn if not given.
        bits: how many directions are drawn.
        min_len: see above.
        causal: with `N = M`.
        scale: factor on the scores, default `D ** -0.5`.
        generator: source of `proj` and of the samples.
        sampled: the samples instead of drawing them: for each estimated rectangle, smallest (deepest)
            first, integers `(1 or B, H * pieces, s)`, where `pieces` equal parts of the sequence are
            estimated at once and head `h`'s piece `p` stands at `h * pieces + p`. They count slots of
            the sorted keys.
        exclude_own: leave out drawn keys in a query's own block, which has counted them already.
        return_lse: also return the log-sum-exp.

    Returns:
        `out` `(B, H, N, Dv)`, and with `return_lse` the estimated `lse` `(B, H, N)`. Gradients flow
        through the weights and values, not through the choice.

    Raises:
        ValueError: sizes out of range, `causal` with `N != M`, both parts left out, or samples that do
            not fit.
    """
    _check(q, k, v, block, samples, min_len, causal)
    if proj is None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 62:
            raise ValueError(f"hyper_attention: bits must be an integer from 1 to 62, got {bits!r}")
        proj = _draw_directions(q.shape[-1], bits, generator)
    given = None if sampled is None else iter(sampled)
    estimate = _Estimate(proj, block, samples, min_len, scale, generator, given, exclude_own)
    out, lse = (_causal if causal else _whole)(estimate, q, k, v, 1)
    if given is not None and (left := sum(1 for _ in given)):
        raise ValueError(f"hyper_attention: sampled has {left} sets more than there are rectangles")
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Estimate:
    """The arguments of :func:`hyper_attention` that do not change with the piece."""

    proj: Tensor
    block: int
    samples: int
    min_len: int
    scale: float | None
    generator: torch.Generator | None
    given: Iterator[Tensor] | None
    exclude_own: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Part:
        part: Part = attend(q, k, v, scale=self.scale, return_lse=True, **where)
        return part

    def slots(self, q: Tensor, m: int, pieces: int) -> Tensor:
        """Sampled slots `(B, H, s)` of one rectangle; its pieces are batch entries."""
        b, h = q.shape[0] // pieces, q.shape[1]
        if self.given is None:
            shape = (b, h * pieces, self.samples)
            device = "cpu" if self.generator is None else self.generator.device
            slots = torch.randint(m, shape, generator=self.generator, device=device)
        else:
            slots = self._next(b, h * pieces, m)
        slots = slots.to(q.device, torch.int64)
        return slots.unflatten(1, (h, pieces)).transpose(1, 2).flatten(0, 1)

    def _next(self, b: int, heads: int, m: int) -> Tensor:
        assert self.given is not None
        slots = next(self.given, None)
        if slots is None:
            raise ValueError("hyper_attention: sampled has fewer sets than there are rectangles")
        if slots.dim() != 3 or slots.shape[0] not in (1, b) or slots.shape[1] != heads:
            raise ValueError(
                f"hyper_attention: sampled must be (1 or {b}, {heads}, s), got {tuple(slots.shape)}"
            )
        if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < m:
            raise ValueError(
                f"hyper_attention: sampled must count slots in [0, {m}), got "
                f"{int(slots.min())} to {int(slots.max())}"
            )
        return slots.expand(b, -1, -1)


def _causal(estimate: _Estimate, q: Tensor, k: Tensor, v: Tensor, pieces: int) -> Part:
    """Causal attention of sequences that are `pieces` parts of longer ones."""
    n = q.shape[2]
    if n <= estimate.min_len:
        return estimate.attend(q, k, v, mask=Causal())
    half = -(-n // 2)
    if n % 2:
        # One row of zeros at the end, which no real row sees.
        q, k, v = (F.pad(x, (0, 0, 0, 1)) for x in (q, k, v))
    batch = q.shape[0]
    # Halves as batch entries rather than as heads, so that groups of heads stay together.
    q2, k2, v2 = (x.unflatten(2, (2, half)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out, lse = _causal(estimate, q2, k2, v2, 2 * pieces)
    out, lse = (x.unflatten(0, (batch, 2)) for x in (out, lse))
    across = _whole(estimate, q[:, :, half:], k[:, :, :half], v[:, :, :half], pieces)
    low, low_lse = merge([(out[:, 1], lse[:, 1]), across])
    return (
        torch.cat([out[:, 0], low], dim=2)[:, :, :n],
        torch.cat([lse[:, 0], low_lse], dim=2)[:, :, :n],
    )


def _whole(estimate: _Estimate, q: Tensor, k: Tensor, v: Tensor, pieces: int) -> Part:
    """Attention of all queries to all keys."""
    n, m, block = q.shape[2], k.shape[2], estimate.block
    if n < estimate.min_len or n == 0 or m <= max(block, 0):
        return estimate.attend(q, k, v)
    group = q.shape[1] // k.shape[1]
    perm_q, perm_k = (
        angular_lsh(x, estimate.proj).sort(dim=-1, stable=True).indices for x in (q, k)
    )
    perm_k = perm_k.repeat_interleave(group, dim=1)
    blocks = -(-m // block) if block else 1
    side = block if -(-n // max(block, 1)) == blocks else -(-n // blocks)
    parts, log_weights = [], []
    if block:
        own = torch.arange(-(-n // side), device=q.device)[:, None].expand(*q.shape[:2], -1, 1)
        plain = torch.zeros_like(own, dtype=torch.bool)
        layout = BlockLayout(n, m, side, block, own, plain, None, perm_q, perm_k)
        parts.append(estimate.attend(q, k, v, layout=layout))
        log_weights.append(0.0)
    if estimate.samples or estimate.given is not None:
        slots = estimate.slots(q, m, pieces)
        drawn = perm_k.gather(2, slots)
        keys, values = (_rows(x, drawn, group) for x in (k, v))
        where = {}
        if block and estimate.exclude_own:
            where["layout"] = _others(slots, n, side, block, perm_q)
        parts.append(estimate.attend(q, keys, values, **where))
        log_weights.append(math.log(m / slots.shape[2]))
    return merge(parts, log_weights)


def _rows(x: Tensor, rows: Tensor, group: int) -> Tensor:
    """Rows `(B, H, s)` of `x` `(B, Hkv, M, D)`, a set for each query head."""
    b = torch.arange(x.shape[0], device=x.device)[:, None, None]
    h = torch.arange(rows.shape[1], device=x.device)[:, None] // group
    return x[b, h, rows]


def _others(slots: Tensor, n: int, side: int, block: int, perm_q: Tensor) -> BlockLayout:
    """Which of the drawn keys each query block reads: those outside its own block of keys."""
    s = slots.shape[2]
    row = torch.arange(-(-n // side), device=slots.device)[:, None]
    outside = (slots // block)[:, :, None] != row
    index = torch.where(outside, torch.arange(s, device=slots.device), -1)
    return BlockLayout.from_index(index, n, s, (side, 1), perm_q=perm_q)


def _draw_directions(width: int, bits: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(width, bits, generator=generator, device=device)


def _check(
    q: Tensor, k: Tensor, v: Tensor, block: int, samples: int, min_len: int, causal: bool
) -> None:
    check_sizes("hyper_attention", block, samples, min_len)
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            "hyper_attention: q, k and v must be (batch, heads, length, width), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"hyper_attention: k has {k.shape[1]} heads, which does not divide q's {q.shape[1]}"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"hyper_attention: causal needs as many keys as queries, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
        )


def check_sizes(name: str, block: int, samples: int, min_len: int) -> None:
    """Raise `ValueError` unless these are sizes of :func:`hyper_attention`."""
    for argument, value in (("block", block), ("samples", samples), ("min_len", min_len)):
        least = 1 if argument == "min_len" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {argument} must be an integer >= {least}, got {value!r}")
    if block == 0 and samples == 0:
        raise ValueError(f"{name}: block and samples are both 0, expected one of them at least")
