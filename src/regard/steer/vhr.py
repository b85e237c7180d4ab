"""VHR: heads whose output changes most when the image is taken away are scaled up.

"Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949. The
divergence of a head is the distance between its outputs (before the output projection) at the first
generation step with and without the image; heads above the median of their layer are reinforced. The two
runs share the reinforced lower layers (Algorithm 1): :func:`~regard.steer.vhr_branches.calibrate_vhr`
runs both at once. Followed: the paper; its repository could not be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from regard.card import Card

from ..models import saved
from ..models.calls import Pass
from ..models.edit import Edit, Layers, Rows, Site
from ..models.method import Calibrated
from ..models.spans import Spans

CARD = Card(
    key="vhr",
    title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
    arxiv="2412.13949",
    family="steer",
    entry="regard.steer.vhr:VHR",
    definition="tests/steer/test_vhr.py::test_both_branches_at_once_are_algorithm_1_written_out",
    oracle="python -m tests.golden tests/golden/data/smollm2-steer.npz",
    claim="python -m benchmarks.vhr --smollm2",
    cost="python -m benchmarks.vhr --only growth",
    note="On SmolLM2 with a paragraph as the image the chosen heads do no better than random ones: the "
    "benchmark prints both. Heads chosen within the prefill (heads=None) compare with the image hidden "
    "in one layer at a time, an approximation of ours; calibrate_vhr is the paper's Algorithm 1.",
)

Where: TypeAlias = Literal["answer", "all"]


def head_divergence(z: Tensor, without: Tensor) -> Tensor:
    """VHD (eq. 5): distance of each head's output ``(..., H, D)`` from that without the image."""
    if z.shape != without.shape:
        raise ValueError(
            f"head_divergence: z has shape {tuple(z.shape)}, without {tuple(without.shape)}"
        )
    return (z - without).norm(dim=-1)


def drop_outliers(divergence: Tensor, without: Tensor) -> Tensor:
    """Divergence ``(..., H)``, 0 for heads that diverge because they are large without the image too.

    A head is one when its divergence and the squared norm of ``without`` ``(..., H, D)`` both exceed
    the mean over the layer's heads by more than their sample standard deviation.
    """
    size = without.square().sum(-1)
    large = [x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True) for x in (divergence, size)]
    return divergence.masked_fill(large[0] & large[1], 0.0)


def vision_heads(divergence: Tensor) -> Tensor:
    """Which heads of ``(..., H)`` lie above the median of their layer (eq. 8), bool."""
    return divergence > divergence.median(-1, keepdim=True).values


def total_divergence(divergence: Tensor, k: int) -> Tensor:
    """T-VHD (eq. 6), ``(...)``: the ``k`` largest of each layer of ``(..., L, H)``, summed."""
    if not 1 <= k <= divergence.shape[-1]:
        raise ValueError(f"total_divergence: k must lie in [1, {divergence.shape[-1]}], got {k}")
    return divergence.topk(k, -1).values.sum((-2, -1))


def choose(z: Tensor, without: Tensor, outlier: bool = True) -> Tensor:
    """The heads to reinforce, bool ``(..., H)``, from both outputs ``(..., H, D)``."""
    divergence = head_divergence(z, without)
    return vision_heads(drop_outliers(divergence, without) if outlier else divergence)


def default_layers(depth: int) -> list[int]:
    """The paper's layers for LLaVA, 14 of 32: the second one, and the last 14/32 of the depth."""
    last = range(depth - round(depth * 14 / 32), depth)
    return sorted({min(1, depth - 1), *last})


@dataclass(frozen=True, eq=False)
class VHR(Calibrated):
    """Vision-aware head reinforcement in a running model.

        method = calibrate_vhr(model, inputs, spans)          # Algorithm 1, one pass of both branches
        with regard.patch(model, method, spans=spans):
            model.generate(**inputs)

    It multiplies the output of chosen heads by ``alpha``, in the prompt's last row and every later one,
    so that the prompt's keys and values stay as they are; with ``rows="all"`` in every row of the
    prompt as well, once the heads are known beforehand.

    Without ``heads`` they are chosen while the prompt is read, by its last row: each head's output is
    compared with what it is when the layer's weights on the image are set to 0 and the rest made to sum
    to 1. That hides the image in one layer at a time and needs no second run; it is not the paper's.

    Attributes:
        alpha: factor; 1 changes nothing.
        heads: bool ``(L, H)``, or ``(B, L, H)`` for the sequences of one batch.
        layers: layers in which heads are chosen while ``heads`` is ``None``; see
            :func:`default_layers`.
        outlier: see :func:`drop_outliers`.
        rows: ``"answer"`` or ``"all"``.
        image: name of the image's span; not needed with ``heads``.

    Raises:
        ValueError: a knob is out of range; while running: no such span, ``heads`` of another model or
            batch, or the patch was entered when the prompt had already been read.
    """

    alpha: float = 2.0
    heads: Tensor | None = None
    layers: Sequence[int] | None = None
    outlier: bool = True
    rows: Where = "answer"
    image: str = "image"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"VHR: alpha must be >= 0, got {self.alpha}")
        if self.rows not in get_args(Where):
            raise ValueError(f"VHR: rows must be one of {get_args(Where)}, got {self.rows!r}")
        if self.heads is None and self.rows == "all":
            raise ValueError(
                "VHR: rows='all' needs heads, which are otherwise known after the prompt only"
            )
        if self.heads is not None and (
            self.heads.dtype != torch.bool or self.heads.dim() not in (2, 3)
        ):
            raise ValueError(
                f"VHR: heads must be bool (L, H) or (B, L, H), got {self.heads.dtype} "
                f"{tuple(self.heads.shape)}"
            )

    def edits(self) -> Sequence[Edit]:
        """A reader of the prompt's last row, unless heads are given, and an edit of heads."""
        if self.heads is None:
            layers: Layers = default_layers if self.layers is None else self.layers
            read = Edit("weights", self._choose, layers=layers, rows=_asking, observes=True)
            scale = Edit("heads", self._reinforce, layers=layers, rows="answer")
            return [read, scale]
        some = self.heads.reshape(-1, *self.heads.shape[-2:])
        chosen = some.any(0).any(-1).nonzero().flatten().tolist()
        rows: Rows = "answer" if self.rows == "answer" else "all"
        return [Edit("heads", self._reinforce, layers=chosen, rows=rows)]

    def save(self, path: str | Path) -> None:
        """Write the heads (safetensors) and the knobs (JSON in its header).

        Raises:
            ValueError: ``heads`` is ``None``: nothing was calibrated.
        """
        if self.heads is None:
            raise ValueError("VHR.save: heads is None; calibrate_vhr finds them")
        knobs = {"alpha": self.alpha, "rows": self.rows, "image": self.image}
        saved.write(path, "vhr", {"heads": self.heads}, knobs, self.made_for)

    @classmethod
    def load(cls, path: str | Path) -> VHR:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another file.
        """
        tensors, knobs = saved.read(path, "vhr", "VHR")
        return cls(heads=tensors["heads"], made_for=saved.model_of(path, "VHR"), **knobs)

    def _choose(self, weights: Tensor, site: Site) -> Tensor:
        """Heads of one layer, from the prompt's last row ``(B, H, 1, M)`` and its values."""
        call = site.call
        assert call is not None
        if site.spans is None:
            raise ValueError(
                f"VHR: no span {self.image!r} was declared; give "
                f"patch(..., spans=Spans.of({self.image}=(start, stop)))"
            )
        image = site.spans.contains(self.image, call.columns)
        values = call.v.repeat_interleave(weights.shape[1] // call.v.shape[1], 1).to(weights)
        hidden = weights.masked_fill(image, 0.0)
        # Where nothing is hidden the ratio is 1 exactly, so that nothing diverges.
        total, left = (x.sum(-1, keepdim=True) for x in (weights, hidden))
        hidden = hidden * torch.where(left > 0, total / left, 0.0)
        z, without = ((x[:, :, -1:] @ values)[:, :, 0] for x in (weights, hidden))
        site.cache_store["heads", site.layer] = choose(z, without, self.outlier)
        return weights

    def _reinforce(self, z: Tensor, site: Site) -> Tensor:
        if self.heads is None:
            chosen = site.cache_store.get(("heads", site.layer))
            if chosen is None:
                raise ValueError(
                    f"VHR: the heads of layer {site.layer} are not known; enter the patch before the "
                    "prompt is read"
                )
        else:
            if self.heads.shape[-2] <= site.layer or self.heads.shape[-1] != z.shape[2]:
                raise ValueError(
                    f"VHR: heads {tuple(self.heads.shape)} do not fit layer {site.layer} with "
                    f"{z.shape[2]} heads"
                )
            chosen = self.heads[..., site.layer, :].reshape(-1, z.shape[2]).to(z.device)
        batch, known = z.shape[0], chosen.shape[0]
        if batch % known:
            raise ValueError(f"VHR: heads are for {known} sequences, the batch has {batch}")
        chosen = chosen.repeat_interleave(batch // known, 0)  # beams of a sequence stand together
        return torch.where(chosen[:, None, :, None], self.alpha * z, z)


def _stop(passing: Pass, spans: Spans | None) -> int:
    return passing.prompt if spans is None or spans.length is None else spans.length


def _asking(rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
    """The prompt's last row."""
    return rows == _stop(passing, spans) - 1
