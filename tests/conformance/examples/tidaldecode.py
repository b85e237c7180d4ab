"""TidalDecode: a layer that reads what the layer before it chose."""

from __future__ import annotations

import torch

from regard.sparse.tidaldecode import TidalDecode
from regard.sparse.tidaldecode_state import TidalState
from tests.conformance import AttentionExample


def _fast(q, k, v):
    state = TidalState(5, 0, (), teacher_forced=True)
    state.attend(0, q.flip(-1), k, v)
    return state.attend(1, q, k, v)


def _definition(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n, m = q.shape[2], k.shape[2]
    later = torch.ones(n, m).triu(m - n + 1).bool()
    scores, mine = (x @ k.mT / q.shape[-1] ** 0.5 for x in (q.flip(-1), q))
    top = scores.masked_fill(later, -torch.inf).topk(min(5, m), -1).indices
    chosen = torch.zeros_like(later).expand_as(scores).scatter(-1, top, True)
    return mine.masked_fill(~chosen | later, -torch.inf).softmax(-1) @ v


EXAMPLES = [
    AttentionExample(
        _fast,
        _definition,
        causal=True,
        bad=(
            (lambda: TidalDecode(0), "must be an integer >= 1"),
            (lambda: TidalDecode(4, 3, (2,)), "correct must be an integer >= 4"),
            (lambda: TidalDecode(4, share="group"), "share must be one of head, kv, all"),
            (
                lambda: TidalState(4).layout(0, torch.randn(1, 1, 5, 4), torch.randn(1, 1, 3, 4)),
                "5 queries over 3 keys",
            ),
        ),
    ),
]
