"""GIFT: image tokens to which the gaze turned while the question was read get more weight.

"Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
arXiv 2510.22067. Saliency is the positive change of the attention to an image token from one word of
the question to the next. While an answer is generated, the heads that look at the image most have their
weights multiplied by it, and the heads that look at the question most are raised by the same ratio.

Followed: amazon-science/GIFT, ``inference.py`` and its ``modeling_llama.py``, with a ratio of its own
for every sequence and row (there: batches of one). The words of the question that count (nouns, verbs,
...; a tagger's work) are given as ``words``; by default all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.card import Card

from ..models.calls import AttentionCall
from ..models.edit import Edit, Site
from ..models.method import Method
from .gift_gaze import GazeRows, gaze_of_layer, saliency
from .gift_gaze import gaze_shift as gaze_shift

CARD = Card(
    key="gift",
    title="Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination "
    "Mitigation",
    arxiv="2510.22067",
    family="steer",
    entry="regard.steer.gift:GIFT",
    definition="tests/steer/test_gift.py::test_is_the_algorithm_written_out",
    oracle="python -m tests.golden tests/golden/data/gift.npz",
    claim="python -m benchmarks.gift --smollm2",
    cost="python -m benchmarks.gift --only growth",
    note="On SmolLM2 the rows of the question carry the location of the answer, the last row does not; "
    "that it is the shift of the gaze adds little there.",
)


def gift(weights: Tensor, sigma: Tensor, image: Tensor, query: Tensor) -> Tensor:
    """Enhanced weights of rows that predict the answer, each row on its own.

    Args:
        weights: ``(..., H, R, M)`` after the softmax.
        sigma: factor of each image token, at least 1, ``(I,)`` or ``(..., I)``.
        image, query: their key positions ``(I,)`` and ``(Q,)``, int64.

    Returns:
        As ``weights``; rows sum to 1 (rows of zeros stay). ``sigma`` of ones changes nothing.

    Raises:
        ValueError: ``sigma`` does not fit ``image``, or a single head.
    """
    if sigma.shape[-1] != image.numel():
        raise ValueError(
            f"gift: sigma has {sigma.shape[-1]} entries, image {image.numel()} positions"
        )
    heads = weights.shape[-3]
    if heads < 2:
        raise ValueError(f"gift: half of the heads are chosen, expected two or more, got {heads}")
    image, query = image.to(weights.device), query.to(weights.device)
    seen = weights[..., image]
    looking = _top_half(seen.sum(-1))
    raised = torch.where(looking, seen * sigma.to(weights)[..., None, None, :], seen)
    before, after = (
        torch.where(looking, x, 0.0).sum((-3, -1), keepdim=True) for x in (seen, raised)
    )
    ratio = torch.where(before > 0, after / before.clamp(min=1e-30), 1.0)
    asked = weights[..., query]
    asked = torch.where(_top_half(asked.sum(-1)), asked * ratio, asked)
    out = weights.index_copy(-1, image, raised).index_copy(-1, query, asked)
    total = out.sum(-1, keepdim=True)
    return out / torch.where(total > 0, total, 1.0)


def _top_half(mass: Tensor) -> Tensor:
    """Which half of the heads (rounded down) has the largest ``mass`` ``(..., H, R)``; with an axis."""
    top = mass.topk(mass.shape[-2] // 2, -2).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-2, top, True)[..., None]


@dataclass(frozen=True, eq=False)
class GIFT(Method):
    """Gaze shift-guided enhancement in a running model.

        spans = Spans.of(image=(35, 611), text=(611, 640))
        with regard.patch(model, GIFT(alpha=5.0), spans=spans):
            model.generate(**inputs)

    It reads the weights of the question's rows in the setup layers while the prompt is read, and edits
    the weights of the prompt's last row and of every later one, so that the prompt's keys and values
    stay as they are. Enhancement layers that run before the last setup layer begin with the first
    generated token's row; with a ``sigma`` of :func:`~regard.steer.gift_gaze.calibrate_gaze`, which is
    a pass of its own as in the authors' code, they begin with the prompt's last row.

    Attributes:
        alpha: factors reach from 1 to ``exp(alpha)``; 0 changes nothing. The authors take 5, and 4 for
            Qwen2-VL.
        setup: layers whose gaze is averaged (LLaVA-7B 11, 13B 10, Qwen2-VL 14); default the layer at
            11/32 of the depth, as in LLaVA-7B.
        layers: enhancement layers (LLaVA-7B 12 to 22, 13B 14 to 20, Qwen2-VL 5 to 18); default from the
            layer after the setup layer to 22/32 of the depth.
        words: tokens of the question that count, counted from its first one; default all.
        clip: standard deviations at which the gaze map is cut off.
        sigma: factors ``(I,)`` or ``(B, I)`` for this prompt, instead of a setup in the prefill.
        image, query: names of the spans.

    Raises:
        ValueError: a knob is out of range; while running: no such spans, a question without a token in
            front of it, or the patch was entered when the question had already been read.
    """

    alpha: float = 5.0
    setup: Sequence[int] | None = None
    layers: Sequence[int] | None = None
    words: Sequence[int] | None = None
    clip: float = 3.0
    sigma: Tensor | None = None
    image: str = "image"
    query: str = "text"

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"GIFT: alpha must be >= 0, got {self.alpha}")
        if self.clip <= 0:
            raise ValueError(f"GIFT: clip must be > 0, got {self.clip}")
        if self.setup is not None and not len(self.setup):
            raise ValueError("GIFT: setup names no layer")

    def edits(self) -> Sequence[Edit]:
        """A reader in the setup layers, unless sigma is given, and an edit of the answering rows."""
        layers = self._layers if self.layers is None else self.layers
        enhance = Edit("weights", self._enhance, layers=layers, rows="answer")
        if self.sigma is not None:
            return [enhance]
        look = Edit(
            "weights",
            self._look,
            layers=self._setup_layers,
            rows=GazeRows(self.query),
            observes=True,
        )
        return [look, enhance]

    def _look(self, weights: Tensor, site: Site) -> Tensor:
        heat = gaze_of_layer(weights, site, self.image, self.query, self.words)
        if heat is not None:
            site.cache_store["heat", site.layer] = heat
        return weights

    def _enhance(self, weights: Tensor, site: Site) -> Tensor:
        call = site.call
        assert call is not None
        if site.spans is None:
            raise ValueError(
                f"GIFT: the spans {self.image!r} and {self.query!r} were not declared; give "
                f"patch(..., spans=Spans.of({self.image}=..., {self.query}=...))"
            )
        sigma = self._sigma(site, call)
        if sigma is None:
            return weights
        first, stop = call.own.offset, call.own.offset + call.m
        key = first, stop
        if key not in site.store:  # the same in all layers
            names = (self.image, self.query)
            site.store[key] = [site.spans.positions(name, stop) - first for name in names]
        image, query = site.store[key]
        if sigma.shape[-1] != image.numel():
            raise ValueError(
                f"GIFT: sigma has {sigma.shape[-1]} entries, but the span {self.image!r} has "
                f"{image.numel()} positions"
            )
        kept = image >= 0  # a sliding cache may have dropped the others
        sigma = sigma[..., kept.to(sigma.device)]
        return gift(weights, sigma, image[kept], query[query >= 0])

    def _sigma(self, site: Site, call: AttentionCall) -> Tensor | None:
        """The sequences' factors ``(B, I)``; ``None`` while the question is being read."""
        if self.sigma is not None:
            return self.sigma
        known = site.cache_store.get("sigma")
        if known is None:
            wanted = self._setup_layers(_depth(call))
            heats = [site.cache_store.get(("heat", layer)) for layer in wanted]
            if any(heat is None for heat in heats):
                if call.decoding and call.n == 1:
                    raise ValueError(
                        f"GIFT: the gaze in layers {wanted} is not known; enter the patch before the "
                        "question is read, and with these layers"
                    )
                return None
            known = saliency(
                torch.stack([x for x in heats if x is not None]).mean(0), self.alpha, self.clip
            )
            site.cache_store["sigma"] = known
        found: Tensor = known
        return found

    def _setup_layers(self, depth: int) -> list[int]:
        return [round(depth * 11 / 32)] if self.setup is None else list(self.setup)

    def _layers(self, depth: int) -> range:
        last = min(round(depth * 22 / 32), depth - 1)
        return range(max(self._setup_layers(depth)) + 1, last + 1)


def _depth(call: AttentionCall) -> int:
    """Number of layers of the decoder."""
    config = getattr(call.module, "config", None)
    if config is None:
        raise ValueError("GIFT: the model's depth is not known; give setup and layers")
    return int(config.num_hidden_layers)
