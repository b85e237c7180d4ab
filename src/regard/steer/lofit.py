"""LoFiT: fine-tuning of a few heads' outputs, found first, then given a bias each.

Yin et al., "LoFiT: Localized Fine-tuning on LLM Representations", arXiv 2406.01563. The output ``z``
of a query head becomes ``(1 + A) * z + v`` in front of the output projection. Step 1 trains the scales
``A`` of all heads and ranks the heads by their norm; step 2 starts over from the base model and trains
the biases ``v`` of the highest ones alone. All other weights stay frozen.

Followed: fc2869/lo-fit, ``models/modeling_llama.py`` and ``lofit_trainer.py``: normal initialisation of
deviation 1e-3, AdamW without weight decay (it would pull ``A`` and ``v`` to zero), a learning rate that
falls linearly to 0, L1 on what is trained. Training: :mod:`regard.steer.lofit_train`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.card import Card

from ..models import saved
from ..models.edit import Edit, Site
from ..models.heads import Head, rank
from ..models.interface import ENGINES
from ..models.method import Method
from ..models.sites import find_layers

CARD = Card(
    key="lofit",
    title="LoFiT: Localized Fine-tuning on LLM Representations",
    arxiv="2406.01563",
    family="steer",
    entry="regard.steer.lofit:LoFiT",
    definition="tests/steer/test_lofit.py::test_is_the_formula_written_out",
    oracle="python -m tests.golden tests/golden/data/lofit.npz",
    claim="python -m benchmarks.lofit --train",
    cost="python -m benchmarks.lofit --only growth",
    note="Trained by next-token loss; the authors use DPO for TruthfulQA. In a short run on SmolLM2 "
    "the chosen heads learn the style, but no better than random ones.",
)
PARTS = ("A", "v")


def scale_and_shift(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``(1 + A) * z + v`` for head outputs ``(..., H, D)`` and ``A``, ``v`` ``(H, D)``."""
    return (1 + scale) * z + shift


def head_score(scale: Tensor) -> Tensor:
    """What heads are chosen by: ``|A|_2``, ``(..., D)`` to ``(...)``."""
    return scale.norm(dim=-1)


class LoFiT(nn.Module, Method):
    """Scales and biases of some heads of a model, as a method and as parameters to train.

        method = LoFiT(model, parts=("A",)).init(generator)
        with regard.patch(model, method):
            model(ids, labels=ids).loss.backward()
        heads = method.select(8)

    Every row is edited, those of the prompt included. New ones are zero and change nothing. No spans
    are needed.

    Args:
        model: a transformers decoder; only its sizes are read, it is not kept.
        heads: ``(layer, query head)`` pairs (default all).
        parts: what is trained, of ``"A"`` and ``"v"``; the other stays zero.

    Attributes:
        heads: the pairs, ascending.
        A, v: ``(K, D)``, in their order; ``requires_grad`` for those in ``parts``.

    Raises:
        ValueError: an unknown part, or heads that the model has not.
    """

    def __init__(
        self, model: Any, heads: Collection[Head] | None = None, parts: Sequence[str] = PARTS
    ) -> None:
        super().__init__()
        if not parts or any(part not in PARTS for part in parts):
            raise ValueError(f"LoFiT: parts must be of {', '.join(PARTS)}, got {tuple(parts)}")
        config = model.config.get_text_config()
        depth, count = int(config.num_hidden_layers), int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // count)
        every = [(layer, head) for layer in range(depth) for head in range(count)]
        self.heads = every if heads is None else sorted(set(heads))
        wrong = [head for head in self.heads if head not in set(every)]
        if wrong:
            raise ValueError(f"LoFiT: heads {wrong}, but the model has {depth} layers of {count}")
        self.parts = tuple(parts)
        self.A = nn.Parameter(torch.zeros(len(self.heads), width), requires_grad="A" in parts)
        self.v = nn.Parameter(torch.zeros(len(self.heads), width), requires_grad="v" in parts)

    def init(self, generator: torch.Generator | None = None, std: float = 1e-3) -> LoFiT:
        """Draw what is trained from a normal distribution, as the authors do before training."""
        with torch.no_grad():
            for part in self.trained():
                part.normal_(0.0, std, generator=generator)
        return self

    def trained(self) -> list[nn.Parameter]:
        """The parameters in ``parts``: ``D`` numbers a head for each."""
        return [part for part in (self.A, self.v) if part.requires_grad]

    def select(self, k: int) -> list[Head]:
        """The ``k`` heads with the largest ``|A|_2``, highest first.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= k <= len(self.heads):
            raise ValueError(f"LoFiT.select: k must lie in [1, {len(self.heads)}], got {k}")
        order = rank(head_score(self.A.detach())[None])
        return [self.heads[at] for _, at in order[:k]]

    def edits(self) -> Sequence[Edit]:
        """One edit of the head outputs a layer."""
        return [
            Edit(
                "heads",
                self._edit,
                layers=[layer],
                heads=[h for at, h in self.heads if at == layer],
            )
            for layer in sorted({layer for layer, _ in self.heads})
        ]

    def _edit(self, z: Tensor, site: Site) -> Tensor:
        at = [i for i, (layer, _) in enumerate(self.heads) if layer == site.layer]
        return scale_and_shift(z, self.A[at].to(z.dtype), self.v[at].to(z.dtype))

    def merge(self, model: Any) -> Any:
        """A copy of the model with the edit in its weights: free at inference.

        ``A`` scales columns of the output projections, ``W_O v`` becomes their bias. A folder of such
        a model does not hold the bias where its class expects none: keep the method's file beside it.

        Raises:
            ValueError: an output projection that is not ``nn.Linear``, or a patch is on: a copy of a
                patched model would look for an engine that it has not.
        """
        if any(sites.core in ENGINES for sites in find_layers(model.get_decoder())):
            raise ValueError("LoFiT.merge: model is patched; leave regard.patch first")
        merged = copy.deepcopy(model)
        layers = find_layers(merged.get_decoder())
        width = self.A.shape[1]
        with torch.no_grad():
            for layer in sorted({layer for layer, _ in self.heads}):
                out = layers[layer].module("heads", layer)
                if not isinstance(out, nn.Linear):
                    raise ValueError(
                        f"LoFiT.merge: layer {layer} projects by {type(out).__name__}, expected Linear"
                    )
                weight = out.weight
                shift = weight.new_zeros(weight.shape[0]) if out.bias is None else out.bias.clone()
                for i, (_, head) in self._at(layer):
                    columns = slice(head * width, (head + 1) * width)
                    shift += weight[:, columns] @ self.v[i].to(weight)
                    weight[:, columns] *= 1 + self.A[i].to(weight)
                out.bias = nn.Parameter(shift, requires_grad=weight.requires_grad)
        return merged

    def _at(self, layer: int) -> list[tuple[int, Head]]:
        return [(i, head) for i, head in enumerate(self.heads) if head[0] == layer]

    def save(self, path: str | Path) -> None:
        """Write ``A`` and ``v`` (safetensors) and the heads (JSON in its header)."""
        knobs = {"heads": self.heads, "parts": self.parts}
        saved.write(path, "lofit", {"A": self.A, "v": self.v}, knobs)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> LoFiT:
        """Read what :meth:`save` wrote, for the same kind of model.

        Raises:
            ValueError: another file, or a model of other sizes.
        """
        tensors, knobs = saved.read(path, "lofit", "LoFiT")
        method = cls(model, [(a, b) for a, b in knobs["heads"]], knobs["parts"])
        scale, shift = tensors["A"], tensors["v"]
        if scale.shape != method.A.shape:
            raise ValueError(
                f"LoFiT.load: {path} has heads of width {scale.shape[1]}, the model of "
                f"{method.A.shape[1]}"
            )
        with torch.no_grad():
            method.A.copy_(scale)
            method.v.copy_(shift)
        return method
