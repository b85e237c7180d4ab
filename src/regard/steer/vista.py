"""VISTA: steering along an image-minus-no-image direction, and logits mixed in from late layers.

Li et al., "The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual
Information Steering", arXiv 2502.03628. What the image adds to the last prompt token, layer by layer, is
added to the output of every feed-forward block, with its norm preserved (:class:`NormPreservingSteer`),
and the logits of late layers are mixed into the last one's (:class:`SelfLogits`).

Followed: LzVv123456/VISTA, in the precision of the model (there half). With a single demonstration the
authors' PCA of a zero matrix adds a unit vector to coordinate 0 of the first layer: ``compat=True``
reproduces that, the default does not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from regard.card import Card

from ..models import saved
from ..models.activations import Inputs, capture
from ..models.edit import Edit, Rows, Site
from ..models.method import Calibrated
from .vista_logits import SelfLogits as SelfLogits
from .vista_logits import self_logits as self_logits

CARD = Card(
    key="vista",
    title="The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via "
    "Visual Information Steering",
    arxiv="2502.03628",
    family="steer",
    entry="regard.steer.vista:NormPreservingSteer",
    definition="tests/steer/test_vista.py::test_is_the_formula_written_out",
    oracle="python -m tests.golden tests/golden/data/vista.npz",
    claim="python -m benchmarks.vista --smollm2",
    cost="python -m benchmarks.vista --only growth",
    note="A single demonstration gives pos - neg; compat=True adds the authors' artefact of its PCA. On "
    "SmolLM2 small strengths lower the loss a little, and another prompt's direction nearly as much.",
)


def steering_direction(neg: Tensor, pos: Tensor, compat: bool = False) -> Tensor:
    """The direction of every layer from ``K`` demonstrations.

    The mean of the differences plus their first principal component, over the concatenation of the
    layers. The component's sign makes the demonstration that it moves most move forward.

    Args:
        neg, pos: ``(K, L, C)``, last-token layer outputs without and with the image.
        compat: for ``K = 1``, where there is no component, add the authors' unit vector.

    Returns:
        ``(L, C)``.

    Raises:
        ValueError: other or different shapes.
    """
    if neg.dim() != 3 or neg.shape != pos.shape or not neg.shape[0]:
        raise ValueError(
            f"steering_direction: neg and pos must both be (K, L, C), got {tuple(neg.shape)} and "
            f"{tuple(pos.shape)}"
        )
    shift = (pos - neg).flatten(1)
    mean = shift.mean(0)
    if shift.shape[0] == 1 and not compat:
        return mean.unflatten(0, neg.shape[1:])
    u, _, components = torch.linalg.svd(shift - mean, full_matrices=False)
    sign = torch.sign(u[u[:, 0].abs().argmax(), 0])
    return (mean + sign * components[0]).unflatten(0, neg.shape[1:])


def steer_preserving_norm(x: Tensor, v: Tensor, lam: float = 0.17) -> Tensor:
    """``|x| (x̂ + y) / |x̂ + y|`` with ``y = lam (1 + max(0, cos(x, -v))) v / |v|``.

    Args:
        x: ``(..., C)``; rows of zeros stay.
        v: direction, broadcasts to ``x``; 0 steers nothing.
        lam: strength; 0 changes nothing.

    Returns:
        As ``x``, with the norms of its rows.
    """
    if lam == 0:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide.norm(dim=-1, keepdim=True)
    unit, ahead = (nn.functional.normalize(t, dim=-1) for t in (wide, v.to(wide)))
    against = (-(unit * ahead).sum(-1, keepdim=True)).clamp(min=0)
    moved = unit + lam * (1 + against) * ahead
    return (norm * nn.functional.normalize(moved, dim=-1)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class NormPreservingSteer(Calibrated):
    """Visual information steering in a running model.

        with regard.patch(model, calibrate_vista(model, negative, positive), SelfLogits.of(model)):
            model.generate(**inputs)

    It edits the feed-forward outputs of every row, those of the prompt included, as the authors do: the
    prompt's keys and values change from the second layer on. No spans are needed.

    Attributes:
        v: ``(L, C)``, or ``(B, L, C)`` with a direction for each sequence; see :func:`calibrate_vista`.
        lam: strength; the authors take 0.17 for captions and 0.01 for yes/no questions.
        layers: which ones (default all).
        rows: which ones (default all); see :class:`regard.models.Edit`.

    Raises:
        ValueError: ``v`` has other axes; while running: it does not fit the model or the batch.
    """

    v: Tensor
    lam: float = 0.17
    layers: Collection[int] | None = None
    rows: Rows = "all"

    def __post_init__(self) -> None:
        if self.v.dim() not in (2, 3):
            raise ValueError(
                f"NormPreservingSteer: v must be (L, C) or (B, L, C), got {tuple(self.v.shape)}"
            )
        if self.lam < 0:
            raise ValueError(f"NormPreservingSteer: lam must be >= 0, got {self.lam}")

    def edits(self) -> Sequence[Edit]:
        """One edit of the feed-forward outputs."""
        return [Edit("mlp", self._steer, layers=self.layers, rows=self.rows)]

    def _steer(self, x: Tensor, site: Site) -> Tensor:
        layers, width = self.v.shape[-2:]
        if site.layer >= layers or width != x.shape[-1]:
            raise ValueError(
                f"NormPreservingSteer: v is for {layers} layers of width {width}, but layer "
                f"{site.layer} of the model has width {x.shape[-1]}"
            )
        v = self.v[..., site.layer, :]
        if v.dim() == 2:
            if x.shape[0] % v.shape[0]:
                raise ValueError(
                    f"NormPreservingSteer: v is for {v.shape[0]} sequences, the batch has {x.shape[0]}"
                )
            v = v.repeat_interleave(x.shape[0] // v.shape[0], 0)[:, None]  # beams share theirs
        return steer_preserving_norm(x, v, self.lam)

    def save(self, path: str | Path) -> None:
        """Write ``v`` (safetensors) and the knobs (JSON in its header).

        Raises:
            ValueError: ``rows`` is a rule of your own, which no file can hold.
        """
        if not isinstance(self.rows, str):
            raise ValueError("NormPreservingSteer.save: rows must be a name, got a function")
        layers = None if self.layers is None else list(self.layers)
        knobs = {"lam": self.lam, "layers": layers, "rows": self.rows}
        saved.write(path, "vista", {"v": self.v}, knobs, self.made_for)

    @classmethod
    def load(cls, path: str | Path) -> NormPreservingSteer:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another file.
        """
        tensors, knobs = saved.read(path, "vista", "NormPreservingSteer")
        made_for = saved.model_of(path, "NormPreservingSteer")
        return cls(tensors["v"], made_for=made_for, **knobs)


def calibrate_vista(
    model: nn.Module,
    negative: Inputs,
    positive: Inputs,
    *,
    lam: float = 0.17,
    compat: bool = False,
) -> NormPreservingSteer:
    """The method for a prompt, or for ``K`` demonstrations in a batch: two prefill passes.

    Args:
        model: a transformers decoder or vision-language model.
        negative: token ids ``(K, N)`` or keyword arguments of the prompts without the image; for text,
            ``drop_span(ids, spans, "image")[0]``. Pad on the left.
        positive: the same prompts with it.
        lam: strength of the method that is returned.
        compat: see :func:`steering_direction`.
    """
    return NormPreservingSteer(
        steering_direction(last_hidden(model, negative), last_hidden(model, positive), compat), lam
    )


def last_hidden(model: nn.Module, inputs: Inputs) -> Tensor:
    """Layer outputs at the last token, ``(K, L, C)``: no embeddings, before the final norm."""
    found = capture(model, inputs, "resid", rows="last")
    return torch.stack([found["resid", at][:, 0] for at in range(len(found))], 1)
