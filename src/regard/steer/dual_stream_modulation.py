"""Dual-stream modulation: scores of salient image tokens are raised while a model generates.

"Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
arXiv 2501.12206. Two sets of image tokens come from the vision tower: local ones, to which its first
layer's CLS token attends, and summary ones, outliers in the second-to-last layer. Before the softmax the
last row's scores become ``s + alpha |s|`` on the local set and ``s + beta |s|`` on the summary set.

Followed: hasanar1f/llava-hallunication-fix, ``modPAI/attention.py`` and ``llava/.../clip_encoder.py``.
Not there, a reconstruction from the abstract: modulation by head (``by_head``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from regard.card import Card

from ..models.edit import Edit, Site
from ..models.method import Method
from ..models.spans import Spans

CARD = Card(
    key="dual-stream-modulation",
    title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language "
    "Model",
    arxiv="2501.12206",
    family="steer",
    entry="regard.steer.dual_stream_modulation:DualStream",
    definition="tests/steer/test_dual_stream_modulation.py::test_is_the_algorithm_written_out",
    oracle="python -m tests.golden tests/golden/data/dual-stream-modulation.npz",
    claim="python -m benchmarks.dual_stream_modulation --smollm2",
    cost="python -m benchmarks.dual_stream_modulation --only growth",
    note="by_head follows the abstract only: the authors' code has no modulation by head. On SmolLM2 "
    "boosting the right tokens helps, boosting the whole context does not.",
)

RowChoice: TypeAlias = Literal["last", "all"]


def select_tokens(
    first: Tensor,
    penultimate: Tensor,
    local_ratio: float = 0.25,
    iqr: float = 1.5,
    spatial_ratio: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Local and summary image tokens from two layers of a vision tower with a CLS token.

    Args:
        first, penultimate: weights of its first and its second-to-last layer ``(H, T + 1, T + 1)``,
            token 0 is CLS.
        local_ratio: share of the image's tokens that are local, by what CLS gives them in the first
            layer, summed over heads.
        iqr: summary tokens are outliers in the second-to-last layer: above the third quartile by more
            than this many interquartile ranges.
        spatial_ratio: share of tokens that are local too because all tokens together attend to them
            in the first layer. (The authors' code sums over keys, which gives 1 for every token.)

    Returns:
        Two sorted lists of token indices, counted from the image's first token; no token is in both.
    """
    for name, x in (("first", first), ("penultimate", penultimate)):
        if x.dim() != 3 or x.shape[1] != x.shape[2] or x.shape[1] < 2:
            raise ValueError(
                f"select_tokens: {name} must be (H, T + 1, T + 1), got {tuple(x.shape)}"
            )
    for name, share in (("local_ratio", local_ratio), ("spatial_ratio", spatial_ratio)):
        if not 0 <= share <= 1:
            raise ValueError(f"select_tokens: {name} must lie in [0, 1], got {share}")
    near, far = (x[:, 0, 1:].sum(0) for x in (first, penultimate))
    local, summary = salient(near, local_ratio), outliers(far, iqr)
    if spatial_ratio:
        local = torch.cat([local, salient(first[:, :, 1:].sum((0, 1)), spatial_ratio)]).unique()
    return local[~torch.isin(local, summary)], summary


def salient(values: Tensor, ratio: float) -> Tensor:
    """Indices of the largest values ``(T,)``, the share ``ratio`` of them (rounded down), sorted."""
    return values.topk(int(values.numel() * ratio)).indices.sort().values


def outliers(values: Tensor, iqr: float = 1.5) -> Tensor:
    """Indices of the values ``(T,)`` above ``Q3 + iqr (Q3 - Q1)``, sorted."""
    wide = values.double()
    low, high = torch.quantile(wide, 0.25), torch.quantile(wide, 0.75)
    ratio = int((wide > high + iqr * (high - low)).sum()) / wide.numel()
    # As in the authors' code: a share of the tokens, rounded down.
    return salient(values, ratio)


def boost_logits(
    scores: Tensor, cols: Tensor, alpha: float | Tensor, rows: RowChoice = "last"
) -> Tensor:
    """Scores ``s + alpha |s|`` in some columns: an odds boost, a negative score comes nearer to 0.

    Args:
        scores: ``(..., N, M)`` before the softmax. Masked entries (``-inf``, or the dtype's lowest
            number) stay as they are.
        cols: indices ``(K,)`` or bool, broadcasting to ``scores``.
        alpha: a number, or what broadcasts to ``scores``.
        rows: ``"last"`` or ``"all"``.

    Returns:
        As ``scores``.
    """
    if rows not in get_args(RowChoice):
        raise ValueError(f"boost_logits: rows must be one of {get_args(RowChoice)}, got {rows!r}")
    if cols.dtype != torch.bool:
        if cols.numel() and (int(cols.min()) < 0 or int(cols.max()) >= scores.shape[-1]):
            raise ValueError(
                f"boost_logits: cols must lie in [0, {scores.shape[-1]}), got {cols.tolist()}"
            )
        cols = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device).index_fill(
            0, cols.to(scores.device), True
        )
    chosen = cols & (scores > torch.finfo(scores.dtype).min / 2)
    if rows == "last":
        at = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        chosen = chosen & (at == scores.shape[-2] - 1)
    return torch.where(chosen, scores + alpha * scores.abs(), scores)


def guide_logits(logits: Tensor, without: Tensor, gamma: float = 1.1) -> Tensor:
    """Classifier-free guidance ``gamma log p + (1 - gamma) log p0`` of next-token logits ``(..., V)``.

    Args:
        logits: of the model that sees the image.
        without: of the branch without it; :func:`regard.models.drop_span` makes its prompt.
        gamma: 1 changes nothing.

    Returns:
        As ``logits``, up to a constant of each row.
    """
    if logits.shape != without.shape:
        raise ValueError(
            f"guide_logits: logits has shape {tuple(logits.shape)}, without {tuple(without.shape)}"
        )
    return gamma * logits.log_softmax(-1) + (1 - gamma) * without.log_softmax(-1)


def head_factors(scores: Tensor, image: Tensor) -> Tensor:
    """Each head's share of the heads' weight on the image, over an equal share (UNVERIFIED).

    Args:
        scores: ``(B, H, N, M)`` before the softmax.
        image: bool ``(M,)``.

    Returns:
        ``(B, H, N, 1)``, mean 1 over the heads.
    """
    mass = torch.where(image, scores.softmax(-1), 0.0).sum(-1, keepdim=True)
    mean = mass.mean(1, keepdim=True)
    return torch.where(mean > 0, mass / mean.clamp(min=1e-12), 1.0)


@dataclass(frozen=True, eq=False)
class DualStream(Method):
    """Dual-stream modulation in a running model.

        local, summary = tower_tokens(model, pixel_values)
        with regard.patch(model, DualStream(local=local, summary=summary), spans=spans):
            model.generate(**inputs)

    It edits the scores of the prompt's last row and of every later one, so that the prompt's keys and
    values stay as they are, and cached decoding equals one pass over prompt and answer if the spans
    tell the prompt's length.

    Attributes:
        alpha, beta: boosts of local and summary tokens; 0 changes nothing. The authors take .7 and
            .3 to .4.
        local, summary: token indices counted from the span's first token, one list for all sequences;
            see :func:`select_tokens` and
            :func:`~regard.steer.dual_stream_modulation_tower.tower_tokens`. ``local=None``: every token
            of the span that is not a summary token.
        by_head: scale the boosts by :func:`head_factors` (follows the abstract only).
        layers: default all from layer 2 on.
        image: name of the image's span.

    Raises:
        ValueError: a negative boost, a token in both sets; while running: no such span, or indices
            outside it.
    """

    alpha: float = 0.7
    beta: float = 0.4
    local: Sequence[int] | Tensor | None = None
    summary: Sequence[int] | Tensor | None = None
    by_head: bool = False
    layers: Sequence[int] | None = None
    image: str = "image"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"DualStream: {name} must be >= 0, got {getattr(self, name)}")
        for name in ("local", "summary"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(x) for x in value))
        both = set(self.local or ()) & set(self.summary or ())
        if both:
            raise ValueError(f"DualStream: tokens {sorted(both)} are local and summary tokens")

    def edits(self) -> Sequence[Edit]:
        """One edit of the scores of rows that predict the answer."""
        layers = _from_the_third if self.layers is None else self.layers
        return [Edit("logits", self._boost, layers=layers, rows="answer")]

    def _boost(self, scores: Tensor, site: Site) -> Tensor:
        call = site.call
        assert call is not None
        if site.spans is None:
            raise ValueError(
                f"DualStream: no span {self.image!r} was declared; give "
                f"patch(..., spans=Spans.of({self.image}=(start, stop)))"
            )
        key = call.own.offset, call.m
        if key not in site.store:  # the same in all layers
            site.store[key] = self._columns(call.columns, site.spans)
        image, chosen, boost = site.store[key]
        boost = boost.to(scores)
        if self.by_head:
            boost = boost * head_factors(scores, image)
        return boost_logits(scores, chosen, boost, rows="all")

    def _columns(self, columns: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
        """Which columns are the image's, which are boosted, bool ``(M,)``, and by how much."""
        image = spans.contains(self.image, columns)
        tokens = spans.positions(self.image, int(columns[-1]) + 1)
        summary = _among(columns, tokens, self.summary or ())
        local = image & ~summary if self.local is None else _among(columns, tokens, self.local)
        return image, local | summary, self.alpha * local + self.beta * summary


def _from_the_third(depth: int) -> range:
    return range(2, depth)


def _among(columns: Tensor, tokens: Tensor, given: Sequence[int] | Tensor) -> Tensor:
    """Which columns are the given tokens of a span, bool ``(M,)``."""
    chosen = [int(x) for x in given]
    wrong = [x for x in chosen if not 0 <= x < tokens.numel()]
    if wrong:
        raise ValueError(
            f"DualStream: tokens {wrong} lie outside the image's span of {tokens.numel()} tokens"
        )
    places = tokens.to(columns.device)[torch.as_tensor(chosen, dtype=torch.int64)]
    return torch.isin(columns, places)
