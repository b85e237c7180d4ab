"""SeerAttention's gates in a running model: lessons from it, and sparse prefill with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.calls import AttentionCall
from ..models.method import Inner, Method
from ..models.patching import watch
from .seer import SeerGate
from .seer_choice import gate_select
from .seer_distil import Lesson, seer_target


@dataclass(frozen=True)
class Seer(Method):
    """Prefill over the key blocks that gates choose; decoding step by step stays dense.

        with regard.patch(model, Seer(load_gates("gates.safetensors"))):
            model(ids)

    Layers without a gate stay dense. The gates get queries and keys before the rotary embedding and
    the model's positions, in the gates' own dtype; put the gates on the model's device.

    Attributes:
        gates: gates by layer.
        threshold, nz_ratio, keep, dense_rows: as for :func:`~regard.sparse.seer_choice.gate_choice`;
            without any rule the documented threshold 2e-3.
    """

    gates: Mapping[int, SeerGate]
    threshold: float | None = None
    nz_ratio: float | None = None
    keep: int | None = None
    dense_rows: int = 2

    def __post_init__(self) -> None:
        if not self.gates:
            raise ValueError("Seer: gates is empty, expected at least one gate by layer")
        if self.threshold is None and self.nz_ratio is None and self.keep is None:
            object.__setattr__(self, "threshold", 2e-3)

    @torch.no_grad()
    def logits(self, call: AttentionCall) -> Tensor:
        """``z`` ``(B, H, nq, nk)`` of the layer's gate."""
        gate, rotary = self.gates[call.layer], call.rotary
        q = rotary.unrotate(call.q, rotary.query_positions).to(gate.key_weight.dtype)
        k = rotary.unrotate(call.k, rotary.key_positions).to(gate.key_weight.dtype)
        places = rotary.query_positions[:, :: gate.block], rotary.key_positions[:, :: gate.block]
        z: Tensor = gate(q, k, places)
        return z

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Choose, then attend."""
        if call.layer not in self.gates or call.n == 1:
            return inner(call)
        if call.layout is not None:
            raise ValueError(
                f"patch: Seer would choose key blocks in layer {call.layer}, but another method has "
                "chosen already; patch one of them at a time"
            )
        layout = gate_select(
            self.logits(call),
            call.n,
            call.m,
            block=self.gates[call.layer].block,
            threshold=self.threshold,
            nz_ratio=self.nz_ratio,
            keep=self.keep,
            dense_rows=self.dense_rows,
            mask=call.mask,
        )
        return inner(call.replace(layout=layout))


class _Lessons:
    """Takes lessons from every layer of a pass."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.found: dict[int, Lesson] = {}

    def attention(self, call: AttentionCall, out: Tensor) -> None:
        rotary = call.rotary
        self.found[call.layer] = Lesson(
            rotary.unrotate(call.q, rotary.query_positions).clone(),
            rotary.unrotate(call.k, rotary.key_positions).clone(),
            seer_target(call.q, call.k, self.block, mask=call.mask, scale=call.scale),
        )

    def result(self) -> dict[int, Lesson]:
        return self.found


@torch.no_grad()
def lessons(
    model: Any, ids: Sequence[Tensor], layers: Collection[int], block: int = 64
) -> dict[int, list[Lesson]]:
    """Lessons by layer from a model that reads sequences of token ids ``(1, N)``, without padding.

    Args:
        model: a transformers model with rotary embedding; it is not changed.
        ids: sequences, one lesson a layer from each.
        layers: layers that get a gate.
        block: tokens a block, the gates'.
    """
    found: dict[int, list[Lesson]] = {layer: [] for layer in sorted(layers)}
    for one in ids:
        with watch(model, _Lessons(block), layers=layers) as seen:
            model(input_ids=one, use_cache=False)
        for layer, lesson in seen.result().items():
            found[layer].append(lesson)
    return found


def gate_for(model: Any, *, block: int = 64, gate_dim: int | None = None) -> SeerGate:
    """An untrained gate that fits the attention layers of a transformers model.

    Args:
        model: its configuration gives heads, width and the base of the rotary embedding.
        block: tokens a block.
        gate_dim: ``d_g``; by default the width of a head, so that queries are not projected.

    Raises:
        ValueError: the configuration names no rotary base that holds for all layers.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    base = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if base is None:
        raise ValueError(
            f"gate_for: {type(config).__name__} names no rotary base for all layers; make a SeerGate "
            "with the layer's own"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return SeerGate(
        heads,
        kv_heads,
        width,
        block=block,
        gate_dim=width if gate_dim is None else gate_dim,
        rope_base=base,
    )
