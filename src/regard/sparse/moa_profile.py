"""MoA's profile: what the loss would lose by masking each block of each head's attention.

To first order, masking key `j` in row `i` and sharing its weight among the other keys changes the
loss by

    E_ij = A_ij (sum_n g_in A_in - g_ij) / (1 - A_ij),    g = dL / dA

In a running model `g = dL/dO v^T`, so the gradient of each layer's output is enough. `A` and `g` are
computed again in strips of rows when that gradient arrives, and only sums over blocks are kept: no
layer's N x N matrix ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import compute_dtype
from regard.core.masks import Mask
from regard.core.token_select import visible
from regard.models.calls import AttentionCall
from regard.models.method import Inner, Method
from regard.models.patching import patch

from .moa_rules import Rule, check_block, moa_layout

KINDS = ("signed", "block", "entry")
# Entries of a strip of attention weights, over batch and heads.
_STRIP = 1 << 22


def influence(weights: Tensor, grad: Tensor) -> Tensor:
    """First-order change of the loss if a key were masked and its row renormalised, `E`.

    Args:
        weights: `A` `(..., N, M)`, rows that sum to 1 (or hold nothing).
        grad: `g = dL/dA`, the same shape.

    Returns:
        The same shape. A row with a single key has no other to share with: its entry is `-g A`.
    """
    if weights.shape != grad.shape:
        raise ValueError(
            f"influence: grad is {tuple(grad.shape)}, expected A's {tuple(weights.shape)}"
        )
    rest = 1 - weights
    lone = rest <= torch.finfo(weights.dtype).eps
    change = weights * ((weights * grad).sum(-1, keepdim=True) - grad)
    return torch.where(lone, -grad * weights, change / rest.masked_fill(lone, 1.0))


def block_influence(weights: Tensor, grad: Tensor, block: int = 64, kind: str = "signed") -> Tensor:
    """:func:`influence` summed over blocks, `(..., ceil(N / block), ceil(M / block))`.

    Args:
        kind: `"signed"` (the paper's sum), `"block"` for the absolute value of each block's sum,
            `"entry"` for sums of absolute values, as in the authors' profiling code.
    """
    check_block("block_influence", block)
    if kind not in KINDS:
        raise ValueError(f"block_influence: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    effect = influence(weights, grad)
    effect = effect.abs() if kind == "entry" else effect
    n, m = effect.shape[-2:]
    padded = F.pad(effect, (0, -m % block, 0, -n % block))
    sums: Tensor = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3))
    return sums.abs() if kind == "block" else sums


@dataclass(frozen=True, eq=False)
class Influence:
    """A profile at one length.

    Attributes:
        blocks: `(L, Hkv, nb, nb)` float64, mean over the samples; query heads that share a key head
            are summed, since they will share its rule.
        length: tokens of a sample.
        block: tokens a block.
    """

    blocks: Tensor
    length: int
    block: int

    def losses(self, rules: Sequence[Rule]) -> Tensor:
        """What each rule would cost each head, `(L, Hkv, R)`: the influence of what it masks."""
        alpha, beta = zip(*rules, strict=True)
        return rule_losses(self.blocks, moa_layout(alpha, beta, self.blocks.shape[-1], self.block))


def rule_losses(blocks: Tensor, layout: Tensor) -> Tensor:
    """Influence of the causal blocks that are masked, `(..., R)`.

    Args:
        blocks: `(..., nb, nb)`.
        layout: bool `(R, nb, nb)`.
    """
    nb = blocks.shape[-1]
    masked = torch.ones(nb, nb, dtype=torch.bool).tril() & ~layout
    return torch.einsum("...qk,rqk->...r", blocks, masked.to(blocks.dtype))


def call_influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    mask: Mask,
    scale: float,
    block: int = 64,
    kind: str = "block",
) -> Tensor:
    """Block influence of one attention call from the gradient of its output, in strips of rows.

    Args:
        q, k, v: `(B, H, N, D)`, `(B, Hkv, M, D)`, `(B, Hkv, M, Dv)`.
        grad_out: `(B, H, N, Dv)`.

    Returns:
        `(Hkv, ceil(N / block), ceil(M / block))` float64, summed over the batch and over the query
        heads of a key head.
    """
    (b, h, n, _), (hkv, m) = q.shape, k.shape[1:3]
    q, k, v, grad_out = (x.detach().to(compute_dtype(q.dtype)) for x in (q, k, v, grad_out))
    q, grad_out = (x.unflatten(1, (hkv, -1)) for x in (q * scale, grad_out))
    j = torch.arange(m, device=q.device)[None]
    rows = max(1, _STRIP // max(1, b * h * m * block)) * block
    parts = []
    for first in range(0, n, rows):
        part, grad = (x[:, :, :, first : first + rows] for x in (q, grad_out))
        i = torch.arange(first, first + part.shape[3], device=q.device)[:, None] + m - n
        hidden = ~visible(mask, i, j)
        hidden = hidden.expand(-1, h, -1, -1).unflatten(1, (hkv, -1))
        scores = (part @ k[:, :, None].mT).masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        effect = block_influence(weights, grad @ v[:, :, None].mT, block, kind)
        parts.append(effect.double().sum((0, 2)))
    return torch.cat(parts, 1)


@dataclass
class _Watch(Method):
    """Collects the influence of every layer while gradients flow back."""

    block: int
    kind: str
    found: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        if call.not_softmax is not None or call.bias is not None or call.sinks is not None:
            what = call.not_softmax or "has a bias or sinks"
            raise ValueError(f"moa profile: layer {call.layer} {what}, expected plain softmax")
        out = inner(call)

        def collect(grad: Tensor) -> None:
            with torch.no_grad():
                self.found[call.layer] = call_influence(
                    call.q, call.k, call.v, grad, call.mask, call.scale, self.block, self.kind
                ).cpu()

        out.register_hook(collect)
        return out


def profile(
    model: Any,
    samples: Sequence[Tensor],
    *,
    block: int = 64,
    kind: str = "block",
    first: int = 1,
) -> Influence:
    """The influence of every block of every head on a model's next-token loss.

    One forward and one backward pass a sample; parameters get no gradients.

    Args:
        model: a causal language model of transformers.
        samples: token ids `(1, N)`, all of one length.
        block: tokens a block.
        kind: as :func:`block_influence`, applied to each sample before the mean. The paper's
            `"signed"` sums cancel between samples, which takes many of them.
        first: the loss counts predictions of tokens from this one on.

    Raises:
        ValueError: no samples, other lengths, or attention that is no plain softmax.
    """
    check_block("profile", block)
    if kind not in KINDS:
        raise ValueError(f"profile: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    shapes = {tuple(ids.shape) for ids in samples}
    if len(shapes) != 1 or (shape := next(iter(shapes)))[0] != 1 or len(shape) != 2:
        raise ValueError(f"profile: samples must be (1, N), all of one length, got {shapes}")
    if not 1 <= first < shape[1]:
        raise ValueError(f"profile: first must lie in [1, {shape[1] - 1}], got {first}")
    total: Tensor | None = None
    for ids in samples:
        watch = _Watch(block, kind)
        with torch.enable_grad(), patch(model, watch):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            loss = F.cross_entropy(logits[0, first - 1 : -1].float(), ids[0, first:])
            torch.autograd.grad(loss, embedded)
        layers = torch.stack([watch.found[layer] for layer in sorted(watch.found)])
        total = layers if total is None else total + layers
    assert total is not None
    return Influence(total / len(samples), shape[1], block)
