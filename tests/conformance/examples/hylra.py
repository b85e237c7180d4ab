"""HyLRA: a layer that reuses the chunks which an earlier one chose for each key head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regard.core.token_select import TopTokens
from regard.sparse.hylra import LayerReuse
from regard.sparse.hylra_state import ReuseState
from tests.conformance import AttentionExample

CHUNK, KEEP = 4, 3


def _fast(q, k, v):
    selector = TopTokens(KEEP, block=CHUNK, share="kv", sinks=1, recent=1)
    state = ReuseState((-1, 0), (), selector, teacher_forced=True)
    state.attend(0, q.flip(-1), k, v)
    return state.attend(1, q, k, v)


def _definition(q, k, v):
    (b, h, n, d), (hkv, m) = q.shape, k.shape[1:3]
    group = h // hkv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    later = torch.ones(n, m).triu(m - n + 1).bool()
    scores, mine = (x @ k.mT / d**0.5 for x in (q.flip(-1), q))
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    mass = F.pad(weights.view(b, hkv, group, n, m).sum(2), (0, -m % CHUNK))
    mass = mass.unflatten(-1, (-1, CHUNK)).sum(-1)
    own = torch.arange(m - n, m) // CHUNK
    chunk = torch.arange(mass.shape[-1])
    forced = (chunk == 0) | (chunk == own[:, None])
    worth = mass.masked_fill(forced, torch.inf).masked_fill(chunk > own[:, None], -torch.inf)
    top = worth.topk(min(KEEP, len(chunk)), -1).indices
    chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, top, True)
    chosen = chosen.repeat_interleave(CHUNK, -1)[..., :m].repeat_interleave(group, 1)
    return mine.masked_fill(~chosen | later, -torch.inf).softmax(-1) @ v


EXAMPLES = [
    AttentionExample(
        _fast,
        _definition,
        causal=True,
        bad=(
            (lambda: LayerReuse((0,)), "does not come before layer 0"),
            (lambda: LayerReuse((-1, 0), (0,)), "a layer with full attention"),
            (lambda: LayerReuse((-1, 0, 1)), "reuses another's selection itself"),
        ),
    ),
]
