"""Edits: a function applied at one site of chosen layers, heads and rows of a running model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .calls import AttentionCall, Pass, Store
from .spans import Spans

SiteName: TypeAlias = Literal[
    "positions", "logits", "weights", "heads", "attn", "mlp", "resid", "lm_logits"
]
IN_ATTENTION = ("logits", "weights")
SITES: tuple[str, ...] = get_args(SiteName)


@dataclass(frozen=True, eq=False)
class Site:
    """Where an edit is being applied.

    Attributes:
        name: the site.
        layer: layer index, or -1 for ``positions`` and ``lm_logits``.
        rows: columns of the rows in the tensor, ``(R,)`` int64.
        heads: heads in the tensor, ``(H',)`` int64, or ``None`` where the site has none.
        passing: the forward pass.
        owner: the patched method that made the edit (the engine's number for it).
        call: the attention call, for ``logits`` and ``weights``.
        allowed: bool, broadcasts to the tensor: which keys the row may see; likewise.
    """

    name: str
    layer: int
    rows: Tensor
    heads: Tensor | None
    passing: Pass
    owner: int = 0
    call: AttentionCall | None = None
    allowed: Tensor | None = None

    @property
    def spans(self) -> Spans | None:
        """Named parts of the prompt, or ``None`` if none were declared."""
        return self.passing.spans(self.owner)

    @property
    def store(self) -> Store:
        """The method's own dict for one forward pass; it is shared by layers and sites."""
        return self.passing.store(self.owner)

    @property
    def cache_store(self) -> Store:
        """The method's own dict that lives as long as the KV cache; see :class:`AttentionCall`."""
        return self.passing.cache_store(self.owner)


@dataclass(frozen=True)
class After:
    """Rows after the last position of a span, generated ones included."""

    span: str

    def __call__(self, rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
        return rows >= _need(spans, f"After({self.span!r})").end(self.span)


@dataclass(frozen=True)
class In:
    """Rows inside a span."""

    span: str

    def __call__(self, rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
        return _need(spans, f"In({self.span!r})").contains(self.span, rows)


RowRule: TypeAlias = Callable[[Tensor, Pass, "Spans | None"], Tensor]
Rows: TypeAlias = 'Literal["all", "last", "answer", "generated", "prefill"] | RowRule'


Layers: TypeAlias = "Collection[int] | Callable[[int], Collection[int]] | None"


def _need(spans: Spans | None, who: str) -> Spans:
    if spans is None:
        raise ValueError(f"{who}: no spans were declared; give patch(..., spans=Spans.of(...))")
    return spans


def _all(rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
    return torch.ones_like(rows, dtype=torch.bool)


def _last(rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
    return rows == passing.past + passing.n - 1


def _answer(rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
    stop = passing.prompt if spans is None or spans.length is None else spans.length
    return rows >= stop - 1


def _generated(rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
    return rows >= passing.prompt


def _prefill(rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
    return rows < passing.prompt


RULES: dict[str, RowRule] = {
    "all": _all,
    "last": _last,
    "answer": _answer,
    "generated": _generated,
    "prefill": _prefill,
}


@dataclass(frozen=True, eq=False)
class Edit:
    """``fn(x, site) -> x`` at one site.

    What ``fn`` gets, with the chosen rows and heads only (it returns the same shape):

    ============ ================= ==========================================================
    site         tensor            place
    ============ ================= ==========================================================
    positions    ``(B or 1, N)``   position ids given to the decoder (all rows)
    logits       ``(B, H', R, M)`` scaled scores before the softmax, ``-inf`` where masked
    weights      ``(B, H', R, M)`` after the softmax, 0 where masked
    heads        ``(B, R, H', D)`` input of the output projection
    attn         ``(B, R, C)``     output of the attention block
    mlp          ``(B, R, C)``     output of the feed-forward block
    resid        ``(B, R, C)``     output of the layer
    lm_logits    ``(B, R, V)``     output of the language-model head
    ============ ================= ==========================================================

    ``logits`` and ``weights`` come in tiles of query rows, float32 (float64 for float64), in
    ascending order; masked entries stay masked whatever ``fn`` returns.

    Args:
        site: one of the names above.
        fn: the edit.
        layers: layer indices, ``None`` for all, or a function of the model's number of layers that
            gives them.
        heads: query-head indices, or ``None`` for all; for ``logits``, ``weights`` and ``heads``.
        rows: ``"all"``; ``"last"`` (the last row of each pass, every row in decoding); ``"answer"``
            (the prompt's last row, which predicts the answer's first token, and all after it);
            ``"generated"``; ``"prefill"`` (rows of the prompt); :class:`After`, :class:`In`; or a
            function ``(rows, pass, spans) -> bool tensor``.
        observes: ``fn`` only reads: nothing but its cost changes, and what it returns is ignored.
        owner: whose stores ``fn`` sees; filled in by the engine.
    """

    site: SiteName
    fn: Callable[[Tensor, Site], Tensor]
    layers: Layers = None
    heads: Collection[int] | None = None
    rows: Rows = "all"
    observes: bool = False
    owner: int = 0

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"Edit: no site {self.site!r}; there are {', '.join(SITES)}")
        if isinstance(self.rows, str) and self.rows not in RULES:
            raise ValueError(f"Edit: no row policy {self.rows!r}; there are {', '.join(RULES)}")
        if self.heads is not None and self.site not in (*IN_ATTENTION, "heads"):
            raise ValueError(f"Edit: site {self.site!r} has no heads, got heads={self.heads!r}")

    def of_depth(self, depth: int) -> Edit:
        """The edit for a model of so many layers: its layers as indices, or ``None``."""
        return (
            replace(self, layers=frozenset(self.layers(depth))) if callable(self.layers) else self
        )

    def at_layer(self, layer: int) -> bool:
        """Whether the edit, made for a model by :meth:`of_depth`, applies to this layer."""
        assert not callable(self.layers)
        return self.layers is None or layer in self.layers

    @property
    def everywhere(self) -> bool:
        """Whether every row is chosen, which needs no asking."""
        return self.rows == "all"

    def chosen(self, rows: Tensor, passing: Pass) -> Tensor:
        """Which of these rows (columns of the model's tokens) the edit applies to, bool ``(N,)``."""
        rule = RULES[self.rows] if isinstance(self.rows, str) else self.rows
        if passing.n > 1:
            return rule(rows, passing, passing.spans(self.owner))
        # a decoding step has one row, which is the same in all layers
        if self not in passing.chosen:
            passing.chosen[self] = rule(rows, passing, passing.spans(self.owner))
        return passing.chosen[self]

    def apply(self, x: Tensor, site: Site) -> Tensor:
        """Run ``fn`` and check what it returns."""
        out = self.fn(x, site)
        if self.observes:
            return x
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"Edit at {self.site!r}: fn returned {got}, expected a tensor {tuple(x.shape)}"
            )
        return out

    def head_index(self, heads: int, device: torch.device) -> Tensor:
        """The edit's heads as indices among ``heads``."""
        if self.heads is None:
            return torch.arange(heads, device=device)
        chosen = torch.as_tensor(sorted(self.heads), dtype=torch.int64, device=device)
        if chosen.numel() and (int(chosen[0]) < 0 or int(chosen[-1]) >= heads):
            raise ValueError(f"Edit: heads {chosen.tolist()} do not fit a layer of {heads} heads")
        return chosen
