"""One decoding step of TidalDecode: which layers look at all keys, and what the others read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from ..core.attend import attend
from ..core.bias import Bias
from ..core.layout import BlockLayout
from ..core.masks import Causal, Mask
from ..core.token_select import check_tokens, tokens_layout, top_tokens


def check_layers(name: str, start: int, correct: Collection[int]) -> None:
    """Raise ``ValueError`` unless ``start`` and ``correct`` name layers in the right order."""
    for what, value, least in (("start", start, 0), *(("correct", c, start + 1) for c in correct)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {what} must be an integer >= {least}, got {value!r}")


@dataclass(eq=False)
class TidalState:
    """What the layers of one forward pass share (arXiv 2410.05076, Algorithm 1).

    In layer ``l``, with ``s = scale q k^T`` over all cached keys:

    - ``l < start``: full attention;
    - ``l = start`` or ``l in correct``: full attention, and ``T`` becomes the ``top_k`` keys of ``s``;
    - else: attention over ``T`` alone, softmax within ``T``.

    Call :meth:`begin_step` before each token; a prompt (as many queries as keys) is dense. Several
    tokens over a longer cache, such as a block to verify, have one set a row.

    Attributes:
        top_k: keys in ``T``; fewer where a row may see fewer.
        start: first layer that selects.
        correct: later layers that select again. Those that the model does not have say nothing.
        share: ``"head"`` (the paper's: query head ``h`` reads what head ``h`` of the selecting layer
            chose), ``"kv"`` or ``"all"`` (chosen together, by the sum of the heads' weights).
        own: whether a row's own token is always in ``T``, counted towards ``top_k``. The paper's is
            not.
        teacher_forced: treat every row of a prompt as a decoding step of its own, in one pass.
        chosen: the sets of the latest selecting layer as a layout, or ``None``.
    """

    top_k: int = 256
    start: int = 2
    correct: Collection[int] = (13,)
    share: str = "head"
    own: bool = False
    teacher_forced: bool = False
    chosen: BlockLayout | None = field(default=None, init=False)
    _index: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_tokens("TidalState", self.top_k, 1, self.share)
        check_layers("TidalState", self.start, self.correct)

    def begin_step(self) -> None:
        """Forget what was chosen: a new token comes."""
        self.chosen = self._index = None

    def layout(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        bias: Bias | None = None,
    ) -> BlockLayout | None:
        """What a layer reads: ``None`` for everything that the mask allows.

        Args:
            layer: index of the layer; layers come in order.
            q, k: ``(B, H, N, D)``, the last ``N`` of ``M`` positions, and ``(B, Hkv, M, D)``.
            mask: where a query may look, by default causal; padding is masked before the choice.
            scale, bias: of the layer's scores.

        Raises:
            ValueError: a sparse layer comes before any choice, or its tensors are not those of the
                layer that chose.
        """
        n, m = q.shape[2], k.shape[2]
        if n > m:
            raise ValueError(
                f"TidalDecode: {n} queries over {m} keys; it is made for decoding over a cache"
            )
        if layer < self.start or (n == m and not self.teacher_forced):
            return None
        mask = Causal() if mask is None else mask
        if layer == self.start or layer in self.correct:
            self._index = top_tokens(
                q,
                k,
                self.top_k,
                mask=mask,
                share=self.share,
                recent=int(self.own),
                scale=scale,
                bias=bias,
            )
            self.chosen = tokens_layout(self._index, n, m, mask=mask, kv_heads=k.shape[1])
            return None
        if self.chosen is None or self._index is None:
            raise ValueError(
                f"TidalDecode: layer {layer} reads what an earlier layer chose, but none has chosen "
                f"in this step; layer {self.start} must run first"
            )
        have = (self.chosen.n, self.chosen.m, self._index.shape[0])
        if have != (n, m, q.shape[0]) or self._index.shape[1] not in (1, k.shape[1], q.shape[1]):
            raise ValueError(
                f"TidalDecode: layer {layer} has {n} queries, {m} keys and batch {q.shape[0]}, but "
                f"the positions were chosen for {have[0]}, {have[1]} and {have[2]}; call begin_step() "
                "before each token, and patch only layers that hold the same keys"
            )
        if mask == self.chosen.mask:
            return self.chosen
        # A layer with another mask of its own, a window for instance.
        return tokens_layout(self._index, n, m, mask=mask, kv_heads=k.shape[1])

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The output ``(B, H, N, Dv)`` of one layer; arguments as for :meth:`layout`."""
        mask = Causal() if mask is None else mask
        layout = self.layout(layer, q, k, mask=mask, scale=scale)
        mask = mask if layout is None else layout.mask
        out: Tensor = attend(q, k, v, mask=mask, layout=layout, scale=scale)
        return out
