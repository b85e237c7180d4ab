"""LSceneLLM's magnifier: text rows open the dense features under scene tokens that they looked at.

"LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences", arXiv 2412.01292.
A scene is given as coarse tokens, each with a few dense features. From a layer on, each row of the text
selects the scene tokens that it gives much weight; in the next layer their dense features are further
keys and values for that row, placed where their scene token stands.

Followed: Hoyyyaard/LSceneLLM, ``models/modeling_llama.py``. There two softmaxes are computed over all
keys; here the dense part is merged by log-sum-exp. A row with constant weights selects nothing (there:
0 / 0). That the dense projections start as copies of the layer's own is UNVERIFIED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regard.card import Card

from ..core.attend import attend
from ..models.calls import AttentionCall
from ..models.method import Inner, Method
from .lscenellm_layer import MagnifiedAttention as MagnifiedAttention
from .lscenellm_layer import magnify as magnify
from .lscenellm_layer import scene_weights, select_scene
from .lscenellm_layer import select_dense as select_dense

CARD = Card(
    key="lscenellm",
    title="LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences",
    arxiv="2412.01292",
    family="steer",
    entry="regard.steer.lscenellm:LSceneLLM",
    definition="tests/steer/test_lscenellm.py::test_is_two_softmaxes_written_out",
    oracle="python -m tests.golden tests/golden/data/lscenellm.npz",
    claim="python -m benchmarks.lscenellm --only selection",
    cost="python -m benchmarks.lscenellm --only growth",
    note="The claim is synthetic; dense projections start as copies of the layer's (UNVERIFIED). On "
    "Qwen2-VL dense keys take their scene token's position on each axis, which the paper leaves open.",
)


@dataclass(frozen=True, eq=False)
class LSceneLLM(Method):
    """The magnifier in a running model.

        spans = Spans.of(scene=(35, 163), text=(163, 190))
        with regard.patch(model, LSceneLLM(dense), spans=spans):
            model.generate(**inputs)

    It edits the rows from the text's start on, generated ones included, in the layers after ``first``;
    earlier rows, and so the scene's keys and values, stay as they are. Selections live for one pass, so
    that decoding over the cache is what one pass computes, for beams too. The dense keys and values of
    each layer are kept with the cache.

    Attributes:
        dense: features ``(V, n, C)``, or ``(B, V, n, C)`` for each sequence its own, in the space of
            the layers' inputs; V is the number of scene tokens.
        threshold: share of the row's range of weights above which a scene token is selected; 1 selects
            none and changes nothing.
        first: layer of the first selection (the paper's 8).
        alpha: 0 (nothing) to 1: how much of the magnified output is mixed in.
        projections: layer -> ``(W_k, W_v)``, each ``(Hkv D, C)``; default the layer's own ``k_proj``
            and ``v_proj``, with their biases where they have some (Qwen2).
        scene, text: names of the spans.

    Raises:
        ValueError: a knob is out of range; while running: a span is missing, features that do not fit
            the scene, or a layer whose weights are no plain softmax, has no ``k_proj`` and ``v_proj``,
            no rotary embedding, or a cache that has dropped the scene.
    """

    dense: Tensor
    threshold: float = 96 / 255
    first: int = 8
    alpha: float = 1.0
    projections: Mapping[int, tuple[Tensor, Tensor]] | None = None
    scene: str = "scene"
    text: str = "text"

    def __post_init__(self) -> None:
        if self.dense.dim() not in (3, 4):
            raise ValueError(
                f"LSceneLLM: dense must be (V, n, C) or (B, V, n, C), got {tuple(self.dense.shape)}"
            )
        if not 0 <= self.alpha <= 1 or self.threshold < 0 or self.first < 0:
            raise ValueError(
                f"LSceneLLM: alpha {self.alpha}, threshold {self.threshold}, first {self.first}, "
                "expected [0, 1], >= 0 and >= 0"
            )

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Attention of a layer, with what the layer before has selected opened."""
        out = inner(call)
        if self.threshold >= 1 or self.alpha == 0 or call.layer < self.first:
            return out
        if call.spans is None:
            raise ValueError(
                f"LSceneLLM: no spans {self.scene!r} and {self.text!r}; give patch(..., "
                f"spans=Spans.of({self.scene}=(a, b), {self.text}=(b, c)))"
            )
        upto = call.m + call.own.offset
        text, scene = (call.spans.positions(name, upto) for name in (self.text, self.scene))
        start = int(text[0]) if text.numel() else upto
        behind = int((call.rows < start).sum())
        if behind == call.n or not scene.numel():
            return out
        _check(call)
        columns = scene.to(call.k.device) - call.own.offset
        if int(columns[0]) < 0:
            raise ValueError(f"LSceneLLM: layer {call.layer} has dropped keys of {self.scene!r}")
        # The rows from the text's start on: as the last ones they keep their place under the mask.
        q = call.q[:, :, behind:]
        none = call.k.new_zeros(*call.k.shape[:3], 1)
        _, lse = attend(
            q, call.k, none, mask=call.mask, bias=call.bias, scale=call.scale, return_lse=True
        )
        selected = call.store.get("selected")
        if selected is not None:
            k, v = self._kept(call, columns)
            rows = magnify(out[:, :, behind:], lse, q, k, v, selected, self.alpha, call.scale)
            out = torch.cat([out[:, :, :behind], rows], 2)
        weights = scene_weights(q, call.k[:, :, columns], lse, call.scale)
        call.store["selected"] = select_scene(weights, self.threshold)
        return out

    def _kept(self, call: AttentionCall, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`_open` gives, kept with the KV cache: it is the same in every step."""
        key = "dense", call.layer, call.q.shape[0]
        if key not in call.cache_store:
            call.cache_store[key] = self._open(call, columns)
        found: tuple[Tensor, Tensor] = call.cache_store[key]
        return found

    def _open(self, call: AttentionCall, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Dense keys, rotated to the places of their scene tokens, and values ``(B, Hkv, Vn, D)``."""
        dense = self.dense if self.dense.dim() == 4 else self.dense[None]
        batch, (_, scene, n, _) = call.q.shape[0], dense.shape
        if scene != columns.numel() or dense.shape[0] not in (1, batch):
            raise ValueError(
                f"LSceneLLM: dense is {tuple(self.dense.shape)}, expected features of "
                f"{columns.numel()} scene tokens for {batch} sequences"
            )
        flat = dense.flatten(1, 2).to(call.k)
        k, v = (
            linear(flat, weight.to(flat), None if bias is None else bias.to(flat))
            .unflatten(-1, (call.k.shape[1], -1))
            .transpose(1, 2)
            for weight, bias in self._projections(call)
        )
        rotary = call.rotary
        places = rotary.key_axes[..., columns].repeat_interleave(n, -1)
        k = rotary.rotate(k.expand(batch, -1, -1, -1), places)
        return k, v.expand(batch, -1, -1, -1)

    def _projections(self, call: AttentionCall) -> Sequence[tuple[Tensor, Tensor | None]]:
        """Weight and bias that make keys, then values, of the dense features in this layer."""
        if self.projections is not None:
            given = self.projections.get(call.layer)
            if given is not None:
                return [(weight, None) for weight in given]
        else:
            layers = [getattr(call.module, name, None) for name in ("k_proj", "v_proj")]
            found = [(layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)]
            if len(found) == 2:
                return found
        raise ValueError(
            f"LSceneLLM: layer {call.layer} ({type(call.module).__name__}) has no k_proj and v_proj; "
            "give projections={layer: (W_k, W_v)}"
        )


def _check(call: AttentionCall) -> None:
    """Refuse layers whose weights are not the softmax that the dense keys would join."""
    words = None
    if call.softcap is not None or call.sinks is not None:
        words = "has soft-capped scores or sinks"
    elif any(not edit.observes for edit in call.edits):
        words = "has edited logits or weights"
    elif call.layout is not None:
        words = "has keys chosen by another method"
    elif call.dropout:
        words = "has dropout"
    if words is not None:
        raise ValueError(f"LSceneLLM: layer {call.layer} {words}, its weights are no plain softmax")
