"""HyperAttention: every form against the weights of its pairs, counted one by one."""

from __future__ import annotations

import math

import torch

from regard.sparse.hyper import angular_lsh, hyper_attention
from regard.sparse.hyper_method import HyperAttention
from tests.conformance import AttentionExample


def code(row, proj):
    """Hash of one row: bits of the sides, first bit lowest, then `b ^ (b >> 1)`."""
    number = sum(1 << i for i in range(proj.shape[1]) if float(row @ proj[:, i]) > 0)
    return number ^ (number >> 1)


def count_whole(q, k, proj, block, drawn, min_len, exclude_own=True):
    """How often each pair counts, `(N, M)`; `drawn` are slots of the sorted keys."""
    n, m = len(q), len(k)
    count = torch.zeros(n, m, dtype=torch.float64)
    if n < min_len or m <= block:
        return count + 1
    order_q = sorted(range(n), key=lambda i: code(q[i], proj))
    order_k = sorted(range(m), key=lambda j: code(k[j], proj))
    blocks = math.ceil(m / block) if block else 0
    side = block if block and math.ceil(n / block) == blocks else math.ceil(n / max(blocks, 1))
    for at, i in enumerate(order_q):
        own = at // side
        for slot in range(own * block, min(m, (own + 1) * block)):
            count[i, order_k[slot]] += 1
        for slot in drawn:
            if not (block and exclude_own and slot // block == own):
                count[i, order_k[slot]] += m / len(drawn)
    return count


def count_causal(q, k, proj, block, sets, min_len, depth=0, piece=0, **options):
    """As :func:`count_whole` for causal attention; `sets[depth][piece]` are the slots."""
    n = len(q)
    if n <= min_len:
        return torch.ones(n, n, dtype=torch.float64).tril()
    if n % 2:
        q, k = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (q, k))
    half = len(q) // 2
    count = torch.zeros(len(q), len(q), dtype=torch.float64)
    for at, rows in enumerate((slice(0, half), slice(half, None))):
        count[rows, rows] = count_causal(
            q[rows], k[rows], proj, block, sets, min_len, depth + 1, 2 * piece + at, **options
        )
    drawn = sets[depth][piece] if depth < len(sets) else []
    count[half:, :half] = count_whole(q[half:], k[:half], proj, block, drawn, min_len, **options)
    return count[:n, :n]


def levels(n, min_len):
    """Lengths of the sequences that are halved, the whole one first."""
    found = []
    while n > min_len:
        found.append(n)
        n = math.ceil(n / 2)
    return found


def make_sets(n, m, heads, block, samples, min_len, causal, seed=0):
    """Random slots for a call, in the order of the call: deepest first, batch entries alike."""
    g = torch.Generator().manual_seed(seed)
    if not samples:
        return []
    if not causal:
        estimated = n >= min_len and m > block
        return [torch.randint(m, (1, heads, samples), generator=g)] if estimated else []
    found = []
    for depth, length in enumerate(levels(n, min_len)):
        half = math.ceil(length / 2)
        if half >= min_len and half > block:
            found.append(torch.randint(half, (1, heads << depth, samples), generator=g))
    return found[::-1]


def definition(q, k, v, *, block, min_len, causal, sets, proj, **options):
    """Output and log-sum-exp in float64, pair by pair."""
    q, k, v = q.double(), k.double(), v.double()
    (b, h, n, d), group = q.shape, q.shape[1] // k.shape[1]
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    lse = torch.zeros(b, h, n, dtype=torch.float64)
    for x in range(b):
        for y in range(h):
            rows, keys = q[x, y], k[x, y // group]
            if causal:
                drawn = [
                    one[min(x, len(one) - 1)].view(h, -1, one.shape[-1])[y].tolist()
                    for one in sets[::-1]
                ]
                count = count_causal(rows, keys, proj, block, drawn, min_len, **options)
            else:
                one = sets[0][min(x, len(sets[0]) - 1), y].tolist() if sets else []
                count = count_whole(rows, keys, proj, block, one, min_len, **options)
            weight = count * (rows @ keys.T * d**-0.5).exp()
            total = weight.sum(-1, keepdim=True)
            # A row may have no pair at all, where only samples of its own block were drawn.
            out[x, y] = weight @ v[x, y // group] / total.where(total > 0, torch.ones(()).double())
            lse[x, y] = total[:, 0].log()
    return out, lse


def directions(width, bits=4):
    g = torch.Generator().manual_seed(width)
    return torch.randn(width, bits, generator=g, dtype=torch.float64)


def _options(q, k, causal, **sizes):
    """What both forms get beside the tensors."""
    sets = make_sets(q.shape[2], k.shape[2], q.shape[1], causal=causal, **sizes)
    proj = directions(q.shape[-1])
    return {"causal": causal, "proj": proj, **sizes}, sets


def fast(q, k, v, causal, **sizes):
    options, sets = _options(q, k, causal, **sizes)
    return hyper_attention(q, k, v, sampled=sets or None, return_lse=True, **options)


def slow(q, k, v, causal, **sizes):
    options, sets = _options(q, k, causal, **sizes)
    del options["samples"]
    return definition(q, k, v, sets=sets, **options)


ONE = torch.zeros(1, 2, 6, 4)
BAD = (
    (lambda: hyper_attention(ONE, ONE, ONE, block=-1), "block must be an integer >= 0, got -1"),
    (lambda: hyper_attention(ONE, ONE, ONE, samples=1.5), "samples must be an integer"),
    (lambda: hyper_attention(ONE, ONE, ONE, block=0, samples=0), "both 0"),
    (lambda: hyper_attention(ONE, ONE, ONE, min_len=0), "min_len must be an integer >= 1"),
    (lambda: hyper_attention(ONE, ONE, ONE, bits=0), "bits must be an integer from 1 to 62"),
    (lambda: hyper_attention(ONE[:, :, :3], ONE, ONE, causal=True), "3 queries and 6 keys"),
    (lambda: hyper_attention(ONE, ONE[:, :0], ONE[:, :0]), "does not divide"),
    (lambda: hyper_attention(ONE[0], ONE, ONE), "batch, heads, length, width"),
    (lambda: angular_lsh(ONE, torch.zeros(3, 2)), r"proj must be \(4, 1 to 62\)"),
    (lambda: HyperAttention(block=0, samples=0), "both 0"),
    (lambda: HyperAttention(bits=0), "bits must be an integer >= 1"),
    (
        lambda: hyper_attention(ONE, ONE, ONE, block=2, min_len=1, sampled=[]),
        "fewer sets than there are rectangles",
    ),
    (
        lambda: hyper_attention(ONE, ONE, ONE, sampled=[torch.zeros(1, 2, 3)]),
        "1 sets more than there are rectangles",
    ),
    (
        lambda: hyper_attention(
            ONE, ONE, ONE, block=2, min_len=1, sampled=[torch.zeros(1, 3, 3, dtype=torch.int64)]
        ),
        r"sampled must be \(1 or 1, 2, s\)",
    ),
    (
        lambda: hyper_attention(
            ONE, ONE, ONE, block=2, min_len=1, sampled=[torch.full((1, 2, 3), 6)]
        ),
        r"slots in \[0, 6\)",
    ),
)


def _example(lengths, causal_to_the_bit=False, **options):
    return AttentionExample(
        lambda *qkv: fast(*qkv, **options)[0],
        lambda *qkv: slow(*qkv, **options)[0],
        lengths=lengths,
        causal=causal_to_the_bit,
        bad=BAD,
    )


SQUARE = ((1, 1), (7, 7), (33, 33))
EXAMPLES = [
    _example(
        ((1, 1), (7, 7), (33, 33), (5, 33), (40, 9)), block=4, samples=6, min_len=1, causal=False
    ),
    _example(SQUARE, block=4, samples=6, min_len=4, causal=True),
    _example(SQUARE, block=5, samples=0, min_len=3, causal=True),
    # Without blocks no query's keys depend on other queries.
    _example(SQUARE, True, block=0, samples=8, min_len=4, causal=True),
]
