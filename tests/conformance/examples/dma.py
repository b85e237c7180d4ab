"""Dynamic mask attention: the mask, the function under given scores, and the layer."""

from __future__ import annotations

import torch

from regard import Keys
from regard.core.masks import Causal
from regard.sparse.dma import DynamicMaskAttention, dynamic_mask, dynamic_mask_attention
from tests.conformance import AttentionExample, MaskExample, ModuleExample

WINDOW = 5


def _scores(b, hkv, m):
    """Scores of keys by their places, all different."""
    return (torch.arange(b * hkv * m, dtype=torch.float64) * 1.7).sin().view(b, hkv, m)


def _kept(scores, n, m, valid=None):
    """Of each row the keys that fewer than `WINDOW` visible ones beat."""
    seen = torch.ones(n, m).tril(m - n).bool()
    if valid is not None:
        seen = seen & valid
    beaten = (scores[..., None, :] > scores[..., :, None]).double()
    return seen & (seen.double() @ beaten.mT < WINDOW)


def _same(b, hkv, m):
    # The same in every batch entry, as the suite compares entries alone with entries together.
    return _scores(1, hkv, m).expand(b, -1, -1)


def _fast(q, k, v):
    delta = _same(*k.shape[:3]).float().to(torch.promote_types(q.dtype, torch.float32))
    return dynamic_mask_attention(q, k, v, delta, WINDOW)


def _definition(q, k, v):
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    delta = _same(*k.shape[:3]).float().to(q.dtype)
    mask = delta[:, :, None].masked_fill(~_kept(delta, n, m), -torch.inf)
    k, v, mask = (x.repeat_interleave(group, 1) for x in (k, v, mask))
    return (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v


def _layer(window, spread):
    layer = DynamicMaskAttention(12, 4, 2, window, bias=True)
    with torch.no_grad():
        layer.A += spread
    return layer


def _input(dtype):
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x.to(dtype),)


VALID = torch.arange(29) % 7 != 3
EXAMPLES = [
    MaskExample(
        dynamic_mask(_scores(2, 2, 29), WINDOW, group=2),
        29,
        29,
        lambda n, m: _kept(_scores(2, 2, 29), n, m).repeat_interleave(2, 1),
        causal=True,
    ),
    MaskExample(
        dynamic_mask(_scores(1, 3, 29), WINDOW, Causal() & Keys(VALID)),
        6,
        29,
        lambda n, m: _kept(_scores(1, 3, 29), n, m, VALID),
        causal=True,
    ),
    AttentionExample(
        _fast,
        _definition,
        causal=True,
        bad=(
            (lambda: dynamic_mask(torch.zeros(1, 1, 4), 0), "window must be an integer >= 1"),
            (lambda: dynamic_mask(torch.zeros(4), 1), "scores must be"),
        ),
    ),
    # At A = 0 all scores tie; with more keys than the window, rounding may change the choice.
    *(
        ModuleExample(
            lambda window=window, spread=spread: _layer(window, spread),
            _input,
            causal=True,
            bad=((lambda: DynamicMaskAttention(12, 4, 2, 0), "window must be an integer >= 1"),),
        )
        for window, spread in ((4, 0.0), (9, 0.7))
    ),
]
