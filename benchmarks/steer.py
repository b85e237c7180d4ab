"""Steering methods on SmolLM2: what each adds to a decoding step.

Every method that one patch makes, on a prompt of some 360 tokens whose context plays the image (the
scene, the documents). Steps of the steered model and of a plain copy alternate. Asked is at most 1.3
times the plain step for methods that touch the last row only.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch

from regard.bench.steering import parts
from regard.bench.timing import row
from regard.data import sample_text
from regard.models import Method, Spans, load, patch
from regard.steer.act import ACT
from regard.steer.concentric_causal import ConcentricCausal
from regard.steer.dual_stream_modulation import DualStream
from regard.steer.ee_mllm import EEMLLM
from regard.steer.gift import GIFT
from regard.steer.lofit import LoFiT
from regard.steer.lscenellm import LSceneLLM
from regard.steer.mma import ModalityMutual
from regard.steer.pine import PINE
from regard.steer.var import VAR
from regard.steer.var_dims import find_massive_dims
from regard.steer.vhr import VHR
from regard.steer.vista import NormPreservingSteer
from regard.steer.vista_logits import SelfLogits
from regard.steer.vmtc_cmai import CMAI

from . import main

STEPS = 48
_WORDS = 1200
# Tokens of the context: the square of an even number, for the concentric positions.
_IMAGE = 324


def overhead() -> list[dict[str, Any]]:
    """Seconds of a decoding step, steered and plain."""
    model, tokenizer = load()
    model.eval()
    plain = copy.deepcopy(model)
    ids, told = parts(tokenizer, "What is this about?", sample_text()[:_WORDS].strip(), "image")
    start = told.ranges["image"][0][0]
    stop, third = start + _IMAGE, start + _IMAGE // 3
    named: dict[str, Any] = {"text": told.ranges["text"][0]}
    spans = {
        "image": Spans.of(ids.shape[1], image=(start, stop), **named),
        "scene": Spans.of(ids.shape[1], scene=(start, stop), **named),
        "documents": Spans.of(
            ids.shape[1],
            documents=[(start, third), (third, stop - 40), (stop - 40, stop)],
            **named,
        ),
    }
    rows = []
    for name, method, span in _methods(model, ids):
        ours, theirs = _steps(model, plain, ids, spans[span], method)
        note = f"{ours / theirs:.2f} x the plain step, after {ids.shape[1]} tokens"
        rows.append(row(name, ours, theirs, 1.0, note))
    return rows


def _methods(model: Any, ids: torch.Tensor) -> list[tuple[str, Method, str]]:
    """Name, method and the spans that it needs. Directions and features are drawn: cost is asked."""
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size)
    depth, heads = config.num_hidden_layers, config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(*shape, generator=generator)
    chosen = [(layer, layer % heads) for layer in range(2, depth - 1)]
    tuned = LoFiT(model, heads=chosen)
    tuned.requires_grad_(False)
    features = torch.randn(_IMAGE, 4, config.hidden_size, generator=generator)
    return [
        ("act, a head a layer (2 to L - 2)", ACT(heads=chosen), "image"),
        ("act, all heads of all layers", ACT(), "image"),
        ("concentric-causal", ConcentricCausal(), "image"),
        ("dual-stream-modulation", DualStream(), "image"),
        ("ee-mllm", EEMLLM(), "image"),
        ("gift", GIFT(), "image"),
        ("lofit, a head a layer", tuned, "image"),
        ("lscenellm", LSceneLLM(features), "scene"),
        ("mma", ModalityMutual(), "image"),
        ("pine", PINE(), "documents"),
        ("var", VAR(dims=find_massive_dims(model, ids)), "image"),
        ("vhr", VHR(), "image"),
        ("vista, vectors", NormPreservingSteer(drawn), "image"),
        ("vista, logits", SelfLogits.of(model), "image"),
        ("vmtc-cmai", CMAI(), "image"),
    ]


@torch.no_grad()
def _steps(
    model: Any, plain: Any, ids: torch.Tensor, spans: Spans, method: Method
) -> tuple[float, float]:
    """Median seconds of a step with and without the method."""
    token = ids[:, -1:]
    taken: tuple[list[float], list[float]] = ([], [])
    with patch(model, method, spans=spans):
        caches = [
            one(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            for one in (model, plain)
        ]
        for _ in range(STEPS):
            for one, cache, times in zip((model, plain), caches, taken, strict=True):
                start = time.perf_counter()
                one(input_ids=token, past_key_values=cache, use_cache=True)
                times.append(time.perf_counter() - start)
    return statistics.median(taken[0][2:]), statistics.median(taken[1][2:])


if __name__ == "__main__":
    main([overhead], doc=__doc__)
