"""SeerAttention: its gate, written out block by block, and attention under what it chooses."""

from __future__ import annotations

import torch

from regard.core.attend import attend
from regard.sparse.seer import SeerGate
from regard.sparse.seer_choice import gate_choice, gate_select
from tests.conformance import AttentionExample, ModuleExample
from tests.core.dense import dense_attention

BLOCK = 4


def gate(dtype=torch.float64, heads=4, kv_heads=2, width=8, **options):
    """A gate with reproducible weights."""
    made = SeerGate(heads, kv_heads, width, block=BLOCK, gate_dim=6, **options).double()
    generator = torch.Generator().manual_seed(heads + width)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return made.to(dtype)


def logits(made, q, k):
    """The gate's equations, one pair of blocks at a time, in float64."""
    b, h, n, _ = q.shape
    m, size, d = k.shape[2], made.block, made.gate_dim
    group = h // k.shape[1]
    starts_q, starts_k = range(0, n, size), range(0, m, size)
    z = torch.full((b, h, len(starts_q), len(starts_k)), -1e9, dtype=torch.float64)

    def turn(x, at):
        step = torch.arange(0, d, 2, dtype=torch.float32)
        angle = (at * made.rope_base ** (-step / d)).double()
        one, two = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = angle.float().cos().double(), angle.float().sin().double()
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    for head in range(h):
        keys, queries = k[:, head // group].double(), q[:, head].double()
        for c, at in enumerate(starts_k):
            part = keys[:, at : at + size]
            pooled = torch.cat([part.amax(1), part.amin(1), part.mean(1)], -1)
            one_each = made.query_weight is None
            weight = made.key_weight[head if one_each else head // group].double()
            key = turn(pooled @ weight, at)
            for r, first in enumerate(starts_q):
                mean = queries[:, first : first + size].mean(1)
                if not one_each:
                    mean = mean @ made.query_weight[head].double()
                if at <= min(first + size, n) - 1 + m - n:
                    z[:, head, r, c] = (turn(mean, first + m - n) * key).sum(-1) / d**0.5
    return z


def _fast(q, k, v):
    # A gate keeps its own precision, whatever the model's.
    z = gate(width=q.shape[-1])(q.double(), k.double())
    layout = gate_select(z, q.shape[2], k.shape[2], block=BLOCK, keep=3, dense_rows=0)
    return attend(q, k, v, layout=layout)


def _dense(q, k, v):
    n, m = q.shape[2], k.shape[2]
    z = logits(gate(width=q.shape[-1]), q, k)
    allowed = torch.zeros(q.shape[0], q.shape[1], n, m, dtype=torch.bool)
    stands = 1 if (m - n) % BLOCK == 0 else 2
    for row in range(z.shape[2]):
        last = min((row + 1) * BLOCK, n) + m - n
        visible = -(-last // BLOCK)
        own = list(range(max(0, visible - stands), visible))
        for b in range(z.shape[0]):
            for h in range(z.shape[1]):
                rest = sorted(range(own[0]), key=lambda c: -float(z[b, h, row, c].detach()))
                for c in own + rest[: max(0, 3 - len(own))]:
                    keys = slice(c * BLOCK, (c + 1) * BLOCK)
                    allowed[b, h, row * BLOCK : (row + 1) * BLOCK, keys] = True
    causal = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    return dense_attention(q, k, v, allowed & causal)[0]


def _inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 11, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, 11, 8, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


BAD = (
    (lambda: SeerGate(4, 3, 8), "kv_heads 3 does not divide heads 4"),
    (lambda: SeerGate(4, 2, 8, gate_dim=5), "gate_dim must be even, got 5"),
    (lambda: SeerGate(4, 2, 8, block=0), "block must be an integer >= 1, got 0"),
    (lambda: SeerGate(4, 2, 8, gate_dim=6, project_q=False), "needs gate_dim = head_dim"),
    (lambda: gate()(torch.randn(1, 3, 5, 8), torch.randn(1, 2, 5, 8)), "q must be"),
    (
        lambda: gate()(torch.randn(1, 4, 5, 8), torch.randn(1, 2, 4, 8)),
        "needs as many keys as queries at least",
    ),
    (lambda: gate_choice(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2) > 0), "got none"),
    (lambda: gate_select(torch.zeros(1, 1, 2, 2), 9, block=4, keep=1), r"\(B, H, 3, 3\)"),
)

EXAMPLES = [
    AttentionExample(
        _fast, _dense, lengths=((1, 1), (7, 7), (33, 33), (5, 22)), bad=BAD, value_width=5
    ),
    ModuleExample(lambda: SeerGate(4, 2, 8, block=BLOCK, gate_dim=6), inputs=_inputs, bad=BAD[:1]),
    ModuleExample(lambda: SeerGate(4, 2, 8, block=BLOCK, gate_dim=8), inputs=_inputs, bad=BAD[:1]),
]
