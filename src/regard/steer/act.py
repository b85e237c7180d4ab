"""ACT: attention sinks found while a model runs, scaled down, their mass given to the other tokens.

"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training
through Attention Calibration", arXiv 2406.15765. A key that receives more than a threshold on average
is a sink; the first one (meant to be the beginning of the text) is spared, the others keep the share
``beta`` of their weight. Which heads profit is found offline, by
:func:`~regard.steer.act_heads.calibrate_heads`.

Followed: GATECH-EIC/ACT, ``models/llama_modelling_aug.py``, for a whole prompt. In decoding its divisor
is wrong (one query over all keys); here column sums go on from the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from regard.card import Card

from ..models import saved
from ..models.calls import AttentionCall
from ..models.compute import compute
from ..models.edit import Edit, Site
from ..models.heads import Head
from ..models.method import Calibrated
from ..models.moves import move
from .act_sums import ColumnSums

CARD = Card(
    key="act",
    title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without "
    "Training through Attention Calibration",
    arxiv="2406.15765",
    family="steer",
    entry="regard.steer.act:ACT",
    definition="tests/steer/test_act.py::test_is_the_loop_written_out",
    oracle="python -m tests.golden tests/golden/data/act.npz tests/golden/data/smollm2-act.npz",
    claim="python -m benchmarks.act --smollm2",
    cost="python -m benchmarks.act --only growth",
    note="Applied to every head of SmolLM2 it hurts; the calibrated heads beat the heads that it hurts "
    "on unseen text, and are about even with the plain model there. The paper's threshold 5/N is "
    "known from summaries of the paper only.",
)


def received(weights: Tensor) -> Tensor:
    """What each key receives on average from the queries at or after it, ``(..., M)``.

    Args:
        weights: ``(..., N, M)``; row ``r`` is position ``r + M - N``.
    """
    return weights.sum(-2) / _rows_seen(weights.shape[-2], weights.shape[-1], weights.device)


def sinks_of(
    mean: Tensor,
    rows: Tensor,
    *,
    threshold: float | Tensor,
    keep_first: bool = True,
    min_rows: int = 1,
) -> Tensor:
    """Sinks: keys whose received mean is above the threshold, the first of them spared.

    Args:
        mean: received on average, ``(..., M)``.
        rows: queries behind each mean, ``(M,)``.
        threshold: strictly above it is a sink.
        keep_first: spare the first key above the threshold, whatever its position.
        min_rows: keys that fewer queries have seen are none: the last keys of a text are averages
            over few rows.

    Returns:
        bool ``(..., M)``.
    """
    found = (mean > threshold) & (rows >= min_rows)
    return found & (found.cumsum(-1) > 1) if keep_first else found


def act(
    weights: Tensor,
    beta: float = 0.4,
    threshold: float = 0.1,
    keep_first: bool = True,
    min_rows: int = 1,
) -> Tensor:
    """Calibrated weights (sections 4.1 and 4.2): rows still sum to 1.

    Args:
        weights: ``(..., N, M)`` after the softmax, causal, each ``N x M`` on its own.
        beta: what a sink keeps, in [0, 1]; 1 changes nothing.
        threshold: received mean above which a key is a sink. The authors' scripts take .1 (.15 for
            MT-Bench), the paper 5 / N.
        keep_first, min_rows: see :func:`sinks_of`.

    Returns:
        As ``weights``. What sinks lose is spread in proportion over all other keys, the first one
        included; a row that sees sinks only stays as it is.

    Raises:
        ValueError: ``beta`` outside [0, 1], ``min_rows`` below 1, or weights without rows and keys.
    """
    _check(beta, min_rows)
    if weights.dim() < 2:
        raise ValueError(f"act: weights must be (..., N, M), got {tuple(weights.shape)}")
    rows = _rows_seen(weights.shape[-2], weights.shape[-1], weights.device)
    found = sinks_of(
        received(weights), rows, threshold=threshold, keep_first=keep_first, min_rows=min_rows
    )
    return move(weights, found[..., None, :], ~found[..., None, :], keep=beta)


def _rows_seen(n: int, m: int, device: torch.device) -> Tensor:
    """Of ``n`` queries at the end of ``m`` keys, how many may see each key, ``(M,)``."""
    return (m - torch.arange(m, device=device)).clamp(max=n)


def _check(beta: float, min_rows: int) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"act: beta must lie in [0, 1], got {beta}")
    if min_rows < 1:
        raise ValueError(f"act: min_rows must be >= 1, got {min_rows}")


@dataclass(frozen=True)
class ACT(Calibrated):
    """Attention calibration in a running model: ``regard.patch(model, ACT())``.

    It edits the weights of every row. A prompt's sinks are judged by all rows of the pass, so that
    earlier rows are calibrated by what later rows do, as in the paper; a decoding step judges by the
    column sums of all rows so far, its own included. One pass over a text therefore differs from
    decoding it, and from reading it in pieces, unless ``causal`` is set: then every row is judged by
    the rows up to itself, and all of these are the same.

    Attributes:
        beta, threshold, keep_first, min_rows: as for :func:`act`.
        per_length: divide ``threshold`` by the number of keys (the paper's ``alpha / N``: take 5).
        heads: ``(layer, head)`` pairs, query heads; ``None`` for every head of ``layers``. The paper
            chooses among those of layers 2 to L - 2.
        layers: layers in which every head is calibrated when ``heads`` is ``None``; default all.
        causal: judge every row by the rows up to itself. Early rows judge by few: in all heads of
            SmolLM2 it raises the loss by .7 nats where the paper's rule raises it by .03.

    Raises:
        ValueError: a knob is out of range.
    """

    beta: float = 0.4
    threshold: float = 0.1
    keep_first: bool = True
    min_rows: int = 1
    per_length: bool = False
    heads: Sequence[Head] | None = None
    layers: Sequence[int] | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        _check(self.beta, self.min_rows)
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple((int(a), int(b)) for a, b in self.heads))

    def edits(self) -> Sequence[Edit]:
        """One edit for all heads, or one a layer."""
        if self.heads is None:
            return [Edit("weights", self._calibrate, layers=self.layers)]
        by_layer: dict[int, list[int]] = {}
        for layer, head in self.heads:
            by_layer.setdefault(layer, []).append(head)
        return [
            Edit("weights", self._calibrate, layers=[layer], heads=heads)
            for layer, heads in by_layer.items()
        ]

    def save(self, path: str | Path) -> None:
        """Write the heads (safetensors) and the knobs (JSON in its header).

        Raises:
            ValueError: ``heads`` is ``None``: nothing was calibrated.
        """
        if self.heads is None:
            raise ValueError("ACT.save: heads is None; calibrate them first")
        knobs = {name: getattr(self, name) for name in _KNOBS}
        heads = torch.tensor(self.heads, dtype=torch.int64).reshape(-1, 2)
        saved.write(path, "act", {"heads": heads}, knobs, self.made_for)

    @classmethod
    def load(cls, path: str | Path) -> ACT:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another file.
        """
        tensors, knobs = saved.read(path, "act", "ACT")
        heads = [(a, b) for a, b in tensors["heads"].tolist()]
        return cls(heads=heads, made_for=saved.model_of(path, "ACT"), **knobs)

    def _calibrate(self, weights: Tensor, site: Site) -> Tensor:
        call = site.call
        assert call is not None
        sums: ColumnSums = site.cache_store.setdefault(("sums", site.layer), ColumnSums())
        key = "mean", site.layer
        if self.causal:
            if key not in site.store:
                site.store[key] = None
                sums.begin(call, weights.shape[1])
            mean, count = sums.row_by_row(weights.detach(), site.rows)
        else:
            if key not in site.store:
                whole = weights.shape[2] == call.n
                new = weights.detach().sum(2) if whole else _swept(call, site)
                sums.begin(call, weights.shape[1])
                site.store[key] = sums.add(new, call.n)
            mean, count = site.store[key]
        found = sinks_of(
            mean,
            count,
            threshold=self.threshold / count.amax(-1, keepdim=True)
            if self.per_length
            else self.threshold,
            keep_first=self.keep_first,
            min_rows=self.min_rows,
        )
        return move(weights, found, ~found, keep=self.beta)


_KNOBS = ("beta", "threshold", "keep_first", "min_rows", "per_length", "causal")


def _swept(call: AttentionCall, site: Site) -> Tensor:
    """Column sums ``(B, H', M)`` of a pass whose rows come in several tiles, from a sweep of its own.

    Weights are seen as they reach this edit: the scores' edits and earlier ones of the weights are
    applied.
    """
    before, mine = [], False
    for edit in call.edits:
        mine |= edit.owner == site.owner and edit.site == "weights"
        if not edit.observes and not (mine and edit.site == "weights"):
            before.append(edit)
    sums: list[Tensor] = []

    def add(x: Tensor, at: Site) -> Tensor:
        sums.append(x.detach().sum(2))
        return x

    heads = None if site.heads is None else site.heads.tolist()
    seen = Edit("weights", add, heads=heads, observes=True)
    compute(replace(call, edits=(*before, seen), dropout=0.0))
    return torch.stack(sums).sum(0)
