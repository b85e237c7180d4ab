"""HyperAttention in a running decoder: `with regard.patch(model, HyperAttention()):`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.masks import SlidingWindow
from regard.models.calls import AttentionCall
from regard.models.method import Inner, Method
from regard.models.plain_call import beyond_causal

from .hyper import check_sizes, hyper_attention


@dataclass(frozen=True)
class HyperAttention(Method):
    """HyperAttention (arXiv 2310.05869) instead of causal attention where a whole text is read.

        with regard.patch(model, HyperAttention(), layers=range(20, 30)):
            model(ids)

    Nothing is trained, and something is lost: the paper replaces the last layers and shows how the
    loss grows with their number. Texts of at most `min_len` tokens, layers with a sliding window, and
    steps over a KV cache (where one row has nothing to gain) are computed exactly.

    Directions and samples come from `seed`, anew for every layer and alike for every sequence of a
    batch: the same text gives the same output, alone or beside others, padded or not.

    Attributes:
        block, samples, bits, min_len, exclude_own: as for :func:`~regard.sparse.hyper.hyper_attention`.
        seed: of the directions and samples.

    Raises:
        ValueError: a size out of range; when running, attention that is not the softmax of its scores
            under a causal mask (other masks or layouts, biases, sinks, soft caps, dropout, edits).
    """

    block: int = 256
    samples: int = 256
    bits: int = 7
    min_len: int = 4096
    seed: int = 0
    exclude_own: bool = True

    def __post_init__(self) -> None:
        check_sizes("HyperAttention", self.block, self.samples, self.min_len)
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits < 1:
            raise ValueError(f"HyperAttention: bits must be an integer >= 1, got {self.bits!r}")

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Estimate each sequence of the batch from its first token on."""
        parts = getattr(call.own.pattern, "parts", (call.own.pattern,))
        if call.n != call.m or any(isinstance(part, SlidingWindow) for part in parts):
            return inner(call)
        ends = _ends(call)
        if all(stop - first <= self.min_len for first, stop in ends):
            return inner(call)
        what = beyond_causal(call)
        if what is not None:
            raise ValueError(
                f"HyperAttention: layer {call.layer} has {what}, expected plain causal softmax"
            )
        out = call.v.new_zeros(*call.q.shape[:3], call.v.shape[-1])
        for entry, (first, stop) in enumerate(ends):
            rows = slice(entry, entry + 1), slice(None), slice(first, stop)
            generator = torch.Generator().manual_seed(self.seed * 100_003 + call.layer)
            out[rows] = hyper_attention(
                call.q[rows],
                call.k[rows],
                call.v[rows],
                block=self.block,
                samples=self.samples,
                bits=self.bits,
                min_len=self.min_len,
                causal=True,
                scale=call.scale,
                generator=generator,
                exclude_own=self.exclude_own,
            )
        return out


def _ends(call: AttentionCall) -> list[tuple[int, int]]:
    """Where the tokens of each sequence begin and end among the columns."""
    valid = call.own.valid
    if valid is None:
        return [(0, call.m)] * call.q.shape[0]
    before = (valid.cumsum(-1) == 0).sum(-1)
    behind = (valid.flip(-1).cumsum(-1) == 0).sum(-1)
    return list(zip(before.tolist(), (call.m - behind).tolist(), strict=True))
