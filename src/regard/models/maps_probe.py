"""Attention maps that are never held: any window of any head, computed when it is looked at."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.bias import Bias
from ..core.masks import And, Causal, Mask
from ..core.stat_pooled import Pooled
from ..core.stats import attention_stats
from .calls import AttentionCall

Range = tuple[int, int]


@dataclass
class _Layer:
    """Queries of every pass, and the keys and the mask of the last one."""

    q: list[Tensor] = field(default_factory=list)
    k: Tensor | None = None
    mask: Mask | None = None
    bias: Bias | None = None
    scale: float = 1.0
    crosses: bool = False


class MapsProbe:
    """Keeps queries and keys, ``O(N)``, and gives any window of the weights of any head exactly.

        with regard.watch(model, MapsProbe()) as seen:
            prefill(model, ids)
        maps = seen.result()
        maps.window(17, 3, rows=(4000, 4064), cols=(0, 64))

    It sees one sequence: a prompt in one pass or in pieces, and what is generated after it. Windows
    of a caller's size cost the rows asked for times the keys before them. Of cross-attention rows
    are the decoder's tokens and columns the encoder's.

    Args:
        to: device on which queries and keys are kept; default: where they are.
        dtype: in which they are kept; default: their own.

    Raises:
        ValueError: while watching, at a layer whose weights are no plain softmax any more, or whose
            cache has dropped keys, or a second pass where scores have a bias.
    """

    def __init__(
        self, *, to: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.to, self.dtype = to, dtype
        self.layers: dict[int, _Layer] = {}

    def attention(self, call: AttentionCall, out: Tensor) -> None:
        """Keep one attention call."""
        why = call.not_softmax
        if call.sinks is not None:
            why = "has attention sinks"
        if call.layout is not None:
            why = "reads chosen blocks"
        if call.own.offset:
            why = "has dropped keys from its cache"
        if why is not None:
            raise ValueError(f"MapsProbe: layer {call.layer} {why}")
        layer = self.layers.setdefault(call.layer, _Layer())
        if layer.q and (call.bias is not None or layer.bias is not None):
            why = "has a bias given pass by pass; watch one pass"
            raise ValueError(f"MapsProbe: layer {call.layer} {why}")
        rows = sum(q.shape[2] for q in layer.q)
        if not call.crosses and rows + call.n != call.m:
            raise ValueError(
                f"MapsProbe: layer {call.layer} has {call.m} keys after {rows} + {call.n} queries; "
                "watch one sequence from its start"
            )
        layer.q.append(call.q.detach().to(self.to, self.dtype, copy=True))
        layer.k = call.k.detach().to(self.to, self.dtype, copy=True)
        layer.mask, layer.bias, layer.scale = call.mask, call.bias, call.scale
        layer.crosses = call.crosses

    def result(self) -> MapsProbe:
        """The probe itself."""
        return self

    @property
    def length(self) -> int:
        """Tokens seen."""
        return max((sum(q.shape[2] for q in x.q) for x in self.layers.values()), default=0)

    def window(
        self, layer: int, head: int, rows: Range | None = None, cols: Range | None = None
    ) -> Tensor:
        """Weights of queries ``rows`` on keys ``cols``, ``(B, rows, cols)`` float32."""
        return self.pooled(layer, head, rows, cols, 1)

    def pooled(
        self,
        layer: int,
        head: int,
        rows: Range | None = None,
        cols: Range | None = None,
        width: int = 1,
    ) -> Tensor:
        """Mean mass between bins of ``width`` positions: see :class:`Pooled`."""
        kept, (top, bottom), cols = self._find(layer, head, rows, cols)
        q = kept.q[0] if len(kept.q) == 1 else torch.cat(kept.q, 2)
        k = kept.k
        assert k is not None and kept.mask is not None
        # What differs between heads is asked for all of them.
        alone = kept.bias is None and (kept.mask.heads or 1) == 1
        if alone:
            key_head = head // (q.shape[1] // k.shape[1])
            q, k = q[:, head : head + 1], k[:, key_head : key_head + 1]
        if kept.crosses:
            # the rows asked for count as the last of the keys' positions
            q, stop = q[:, :, top:bottom], k.shape[2]
            top, bottom = stop - (bottom - top), stop
        else:
            # Rows that see nothing later end where the window ends.
            stop = bottom if alone and _causal(kept.mask) else k.shape[2]
            q = q[:, :, top:stop]
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        found = attention_stats(
            q.to(exact),
            k[:, :, :stop].to(exact),
            [Pooled(width, (top, bottom), cols)],
            mask=kept.mask,
            bias=kept.bias,
            scale=kept.scale,
        )["pooled"]
        return found[:, 0 if alone else head]

    def _find(
        self, layer: int, head: int, rows: Range | None, cols: Range | None
    ) -> tuple[_Layer, Range, Range]:
        if layer not in self.layers:
            raise ValueError(f"MapsProbe: no layer {layer}; there are {sorted(self.layers)}")
        kept = self.layers[layer]
        count = kept.q[0].shape[1]
        if not 0 <= head < count:
            raise ValueError(f"MapsProbe: head must lie in [0, {count}), got {head}")
        ranges = []
        keys = kept.k.shape[2] if kept.k is not None else 0
        for name, span, n in (("rows", rows, self.length), ("cols", cols, keys)):
            start, stop = span or (0, n)
            if not 0 <= start < stop <= n:
                raise ValueError(
                    f"MapsProbe: {name} must be (start, stop) within the {n} tokens, got {span}"
                )
            ranges.append((start, stop))
        return kept, ranges[0], ranges[1]


def _causal(mask: Mask) -> bool:
    parts = mask.parts if isinstance(mask, And) else (mask,)
    return any(isinstance(part, Causal) for part in parts)
