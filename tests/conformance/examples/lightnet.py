"""LightNet: attention in both conventions and both ways, its positions, layer, block and model."""

from __future__ import annotations

import torch

from regard.linear.lightnet import lightnet_attention
from regard.linear.lightnet_layer import LightNetAttention
from regard.linear.lightnet_model import LightNetBlock, LightNetModel
from regard.linear.lightnet_pe import MDLRPE, MDTPE, TPE
from tests.conformance import AttentionExample, ModuleExample


def _definition(mass=0, scale=None, causal=True):
    """A softmax over the tokens of every channel, with an empty token of logit 0 for the mass."""

    def dense(q, k, v):
        n, width = q.shape[2:]
        out = []
        for t in range(n):
            seen = slice(0, t + 1 if causal else n)
            delta = k[:, :, seen].exp()
            weight = delta / (delta.sum(2, keepdim=True) + mass)
            memory = (weight.mT @ v[:, :, seen]).repeat_interleave(q.shape[1] // k.shape[1], 1)
            out.append(q[:, :, t : t + 1] @ memory)
        return torch.cat(out, 2) * (width**-0.5 if scale is None else scale)

    return dense


LENGTHS = ((1, 1), (7, 7), (65, 65), (131, 131))
q, kv = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)


def tokens(*shape, grid=None):
    def inputs(dtype):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return (x,) if grid is None else (x, grid)

    return inputs


EXAMPLES = [
    AttentionExample(
        lightnet_attention,
        _definition(),
        lengths=LENGTHS,
        causal=True,
        bad=(
            (lambda: lightnet_attention(q[0], kv, kv), "must be .batch, heads, length, width"),
            (lambda: lightnet_attention(q, kv, kv, initial_mass=2), "must be 0 or 1, got 2"),
            (lambda: lightnet_attention(q, kv - torch.inf, kv), "whole prefix"),
            (lambda: lightnet_attention(q, kv * torch.nan, kv), "holds NaN or .inf"),
            (
                lambda: lightnet_attention(q, kv, kv, mask=torch.ones(1, 3)),
                r"mask must be bool \(1, 3\), got torch.float32",
            ),
        ),
    ),
    AttentionExample(
        lambda q, k, v: lightnet_attention(q, k, v, initial_mass=1, scale=1.0, chunk=16),
        _definition(1, 1.0),
        lengths=LENGTHS[:3],
        causal=True,
        bad=((lambda: lightnet_attention(q, kv[:, :, :2], kv), "recur: k must be"),),
    ),
    AttentionExample(
        lambda q, k, v: lightnet_attention(q, k, v, causal=False),
        _definition(causal=False),
        lengths=LENGTHS[:3],
        bad=(
            (
                lambda: lightnet_attention(q, kv, kv, causal=False, return_state=True),
                "causal=False has no state",
            ),
            (
                lambda: lightnet_attention(q, kv - torch.inf, kv, causal=False),
                "without mass",
            ),
        ),
    ),
    ModuleExample(
        lambda: LightNetAttention(12, 3, 5, axes=1),
        tokens(2, 9, 12),
        causal=True,
        bad=(
            (lambda: LightNetAttention(12, 5), "heads must divide dim 12, got 5"),
            (lambda: LightNetAttention(12, 3, 0), "gate_rank must be >= 1"),
            (lambda: LightNetAttention(12, 3, gate="tanh"), "gate must be 'silu' or 'sigmoid'"),
            (
                lambda: LightNetAttention(12, 3, causal=False)(q[0, :1], return_state=True),
                "has no state",
            ),
            (lambda: LightNetAttention(8, 2, axes=2)(q[0, :1]), "grid must have 2 axes"),
        ),
    ),
    ModuleExample(
        lambda: LightNetBlock(8, 2, 12, 3, axes=2, causal=False),
        tokens(2, 6, 8, grid=(2, 3)),
        bad=(
            (
                lambda: LightNetBlock(8, 2, axes=2, causal=False)(q[0, :1], (2, 2)),
                "hold 3 tokens, got .2, 2.",
            ),
        ),
    ),
    ModuleExample(
        lambda: LightNetModel(8, 2, 2, 12, 3),
        tokens(1, 9, 8),
        causal=True,
        bad=(
            (lambda: LightNetModel(8, 2, 2, axes=2), "causal models have 1 axis"),
            (lambda: LightNetModel(8, 2, 2, positions=False), "has positions"),
            (lambda: LightNetModel(8, 2, 2)(q[0, :1], (3,)), "takes no grid"),
            (
                lambda: LightNetModel(8, 2, 2, causal=False)(q[0, :1], return_state=True),
                "takes no state",
            ),
        ),
    ),
    ModuleExample(
        lambda: MDTPE(8, 2, 3),
        tokens(2, 12, 8, grid=(2, 3, 2)),
        bad=(
            (lambda: MDTPE(8, 2, 0), "axes must be >= 1"),
            (lambda: MDTPE(8, 2, 2)(q[0, :1], (2, 2)), "for 3 tokens"),
            (lambda: TPE(8, 3), "heads must divide dim 8, got 3"),
        ),
    ),
    ModuleExample(
        lambda: MDLRPE(2, 5, 3),
        lambda dtype: (*tokens(2, 2, 9, 5, grid=(2, 2, 2))(dtype), 1),
        bad=(
            (lambda: MDLRPE(2, 5, 0), "axes must be >= 1"),
            (lambda: MDLRPE(2, 5, 2)(torch.zeros(1, 2, 4, 5), (4,)), "1 axes, not 2"),
            (lambda: MDLRPE(2, 5, 2)(torch.zeros(1, 2, 4, 5), (2, 3)), "4 tokens, expected 0"),
            (lambda: MDLRPE(2, 5, 2).angles(torch.zeros(4, 3)), "3 coordinates, expected 2"),
        ),
    ),
]
