"""VMTC and CMAI: fewer image tokens, and text that does not read image tokens off its focus.

"Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy",
arXiv 2411.15453. Token compression keeps the important image tokens and merges the others by k-means.
Attention inhibition blocks pairs of a text row and an image token on which the text that the row reads
has little focus.

Only the abstract and a glossary could be read (k-means merges, a changed causal mask inhibits): every
formula here is a reconstruction. Its choices are options: where a merged token stands, and whether the
focus is cut at a quantile or at a share of the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.card import Card

from ..models.calls import AttentionCall, Pass
from ..models.edit import Edit, Site
from ..models.method import Method
from ..models.spans import Spans
from .vmtc_cmai_merge import Compressed as Compressed
from .vmtc_cmai_merge import compress_tokens as compress_tokens

CARD = Card(
    key="vmtc-cmai",
    title="Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image "
    "Redundancy",
    arxiv="2411.15453",
    family="steer",
    entry="regard.steer.vmtc_cmai:CMAI",
    definition="tests/steer/test_vmtc_cmai.py::test_focus_and_inhibition_are_written_out",
    oracle="tests/steer/test_vmtc_cmai.py::test_limits",
    claim="python -m benchmarks.vmtc_cmai --only duplicates",
    cost="python -m benchmarks.vmtc_cmai --only growth",
    note="UNVERIFIED: from the abstract; all formulas are reconstructions, and their choices options. "
    "Where copies are unequal in number, merging loses more than dropping unless log sizes are added.",
)


def focus_score(weights: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """Focus of text rows on image tokens: ``F = norm(A_tt) A_ti``, ``norm`` making rows sum to 1.

    Args:
        weights: mean of the heads after the softmax, ``(..., N, M)``, or with the heads
            ``(..., H, N, M)`` averaged by the caller; ``N = M``.
        text, image: positions ``(T,)`` and ``(P,)``, int64.

    Returns:
        ``(..., T, P)``. Where a row sees no text its focus is 0.
    """
    rows = weights[..., text, :]
    return _focus(rows[..., text], rows[..., image])


def _focus(on_text: Tensor, on_image: Tensor) -> Tensor:
    total = on_text.sum(-1, keepdim=True)
    return on_text / torch.where(total > 0, total, 1.0) @ on_image


def inhibited(focus: Tensor, quantile: float = 0.0, tau: float = 0.0) -> Tensor:
    """Pairs that are blocked: focus below the row's quantile, or below ``tau`` times its largest.

    Args:
        focus: ``(..., T, P)``, not negative.
        quantile, tau: in [0, 1]; 0 blocks nothing.

    Returns:
        bool as ``focus``; the image token of largest focus is never blocked.
    """
    _shares(quantile, tau)
    if not focus.shape[-1]:
        return torch.zeros_like(focus, dtype=torch.bool)
    # Sorted, not torch.quantile: the threshold is one of the values, so that 0 is the smallest.
    at = int(quantile * (focus.shape[-1] - 1))
    low = focus < focus.sort(-1).values[..., at : at + 1]
    return low | (focus < tau * focus.amax(-1, keepdim=True))


def inhibit(scores: Tensor, focus: Tensor, quantile: float = 0.0, tau: float = 0.0) -> Tensor:
    """Scores ``(..., T, P)`` of text rows and image tokens, ``-inf`` where :func:`inhibited`.

    Raises:
        ValueError: a share outside [0, 1], or focus that does not fit the scores.
    """
    if focus.shape[-2:] != scores.shape[-2:]:
        raise ValueError(
            f"inhibit: focus is {tuple(focus.shape[-2:])}, the scores {tuple(scores.shape[-2:])}"
        )
    return scores.masked_fill(inhibited(focus, quantile, tau), -torch.inf)


def _shares(quantile: float, tau: float) -> None:
    for name, value in (("quantile", quantile), ("tau", tau)):
        if not 0 <= value <= 1:
            raise ValueError(f"CMAI: {name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class CMAI(Method):
    """Cross-modality attention inhibition in a running model.

        spans = Spans.of(image=(35, 611), text=(611, 640))
        with regard.patch(model, CMAI(quantile=0.5), spans=spans):
            model.generate(**inputs)

    The weights of one layer give the focus (mean of the heads); in all later layers the rows of the
    text and of what is generated do not read image tokens off their focus. A generated row's focus is
    that of the question's tokens which it reads, and its own. Other rows stay as they are, and so do
    the image's keys and values. Decoding over the cache is what one pass computes, and so is a prompt
    read in pieces.

    Attributes:
        quantile, tau: see :func:`inhibited`; both 0 change nothing.
        source: layer whose weights give the focus.
        image, text: names of the spans.

    Raises:
        ValueError: a knob is out of range; while running: a span is missing, a layer whose cache has
            dropped the image or the text, or the patch was entered when the text had been read.
    """

    quantile: float = 0.5
    tau: float = 0.0
    source: int = 1
    image: str = "image"
    text: str = "text"

    def __post_init__(self) -> None:
        _shares(self.quantile, self.tau)
        if self.source < 0:
            raise ValueError(f"CMAI: source must be a layer >= 0, got {self.source}")

    def edits(self) -> Sequence[Edit]:
        """A reader of the source layer's weights, and an edit of later scores."""
        if not (self.quantile or self.tau):
            return []
        return [
            Edit("weights", self._read, layers=[self.source], rows=self._rows, observes=True),
            Edit("logits", self._inhibit, layers=self._later, rows=self._rows),
        ]

    def _later(self, depth: int) -> range:
        return range(self.source + 1, depth)

    def _rows(self, rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
        if spans is None:
            raise ValueError(
                f"CMAI: no spans {self.image!r} and {self.text!r}; give patch(..., "
                f"spans=Spans.of({self.image}=(a, b), {self.text}=(b, c)))"
            )
        stop = passing.prompt if spans.length is None else spans.length
        return spans.contains(self.text, rows) | (rows >= max(stop, spans.end(self.image)))

    def _columns(self, site: Site, name: str, upto: int) -> Tensor:
        """Keys of a span in the call."""
        call: AttentionCall | None = site.call
        assert call is not None and site.spans is not None
        columns = site.spans.positions(name, upto).to(call.k.device) - call.own.offset
        if columns.numel() and int(columns[0]) < 0:
            raise ValueError(f"CMAI: layer {site.layer} has dropped keys of {name!r}")
        return columns

    def _read(self, weights: Tensor, site: Site) -> Tensor:
        assert site.call is not None and site.spans is not None
        upto = site.call.m + site.call.own.offset
        image, text = (self._columns(site, name, upto) for name in (self.image, self.text))
        mean = weights.mean(1)
        on_image, on_text = mean[..., image], mean[..., text]
        inside = site.spans.contains(self.text, site.rows)
        # Rows of the question are kept with the cache: they are the same for every beam.
        kept = site.cache_store.get("text")
        before = int((text + site.call.own.offset < int(site.rows[0])).sum())
        have = 0 if kept is None else kept.shape[1]
        if have < before:
            raise ValueError(
                f"CMAI: {have} of {before} rows of {self.text!r} have been seen; enter the patch "
                "before the prompt is read"
            )
        if bool(inside.any()):
            fresh = on_image[:, inside.to(on_image.device)]
            kept = fresh if kept is None else torch.cat([kept[:, :before], fresh], 1)
            site.cache_store["text"] = kept
        if kept is None:
            kept = on_image.new_zeros(on_image.shape[0], 0, image.numel())
        kept = kept[:, : text.numel()]
        on_text = on_text[..., : kept.shape[1]]
        # A row behind the question reads itself too.
        at = (site.rows.to(mean.device) - site.call.own.offset)[:, None]
        own = mean.gather(-1, at.expand(*mean.shape[:-1], 1))
        own = own.masked_fill(inside.to(mean.device)[:, None], 0.0)
        total = (on_text.sum(-1, keepdim=True) + own).clamp(min=1e-30)
        focus = (on_text @ kept + own * on_image) / total
        blocked = inhibited(focus, self.quantile, self.tau)
        found = site.store.setdefault("blocked", [])
        found.append((site.rows, blocked))
        return weights

    def _inhibit(self, scores: Tensor, site: Site) -> Tensor:
        found = site.store.get("blocked")
        if found is None:
            return scores
        assert site.call is not None
        if site.call.n > 1:
            return scores.masked_fill(self._hidden(scores, site, found), -torch.inf)
        key = "hidden", site.call.own.offset, site.call.m
        if key not in site.store:  # the same in all layers
            site.store[key] = self._hidden(scores, site, found)
        return scores.masked_fill(site.store[key], -torch.inf)

    def _hidden(self, scores: Tensor, site: Site, found: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Keys off the focus, bool ``(B, 1, R, M)``."""
        assert site.call is not None
        rows = torch.cat([part for part, _ in found])
        blocked = torch.cat([part for _, part in found], 1)
        place = torch.searchsorted(rows, site.rows)
        image = self._columns(site, self.image, site.call.m + site.call.own.offset)
        hidden = torch.zeros_like(scores[:, :1], dtype=torch.bool)
        hidden[..., image] = blocked[:, place.to(blocked.device)][:, None].to(scores.device)
        return hidden
