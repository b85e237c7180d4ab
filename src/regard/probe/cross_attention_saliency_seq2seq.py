"""Cross-attention of a transformers encoder-decoder against occlusion and gradient saliency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..models.patching import watch
from ..models.progress import Progress
from ..models.site_probe import SiteProbe
from ..models.table import Table
from .cross_attention_saliency import (
    Distributions,
    Score,
    attention_agreement,
    gradient_saliency,
    occlusion_saliency,
)


@dataclass(frozen=True, eq=False)
class CrossAttentionSaliency:
    """What :func:`cross_attention_saliency` finds.

    Attributes:
        agreement: (maps, layer, head, rho_input, rho_encoder, rho_gradient); ``maps`` is ``head``
            for one head, ``layer`` for the mean of a layer's heads, ``all`` for the mean of all;
            layer and head are -1 where they are averaged.
        attention: ``(L, H, T, S)``.
        input_saliency: ``(T, S)``, occlusion of the source's embeddings.
        encoder_saliency: ``(T, S)``, occlusion of the encoder's output.
        gradient: ``(T, S)``, gradient norms at the source's embeddings.
    """

    agreement: Table
    attention: Tensor
    input_saliency: Tensor
    encoder_saliency: Tensor
    gradient: Tensor


def cross_attention_maps(model: Any, ids: Tensor, decoder_ids: Tensor) -> Tensor:
    """Cross-attention weights of one forced pass, ``(B, L, H, T, S)``, without gradients.

    Args:
        model: a transformers encoder-decoder.
        ids: source tokens ``(B, S)``.
        decoder_ids: what the decoder is given, ``(B, T)``.

    Raises:
        ValueError: the model has no cross-attention to give.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"cross_attention_maps: {type(model).__name__} is no encoder-decoder; take the source's "
            "columns of its self-attention, regard.models.MapsProbe"
        )
    probe = SiteProbe("weights")
    with torch.no_grad(), _evaluated(model), watch(model, probe, attention="cross"):
        model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False)
    return torch.stack(list(probe.result()[0].values()), 1)


def from_embeddings(model: Any, decoder_ids: Tensor) -> Distributions:
    """Source embeddings ``(K, S, C)`` to the distributions ``(K, T, V)`` of one forced target."""

    def fn(x: Tensor) -> Tensor:
        forced = decoder_ids.expand(x.shape[0], -1)
        out = model(inputs_embeds=x, decoder_input_ids=forced, use_cache=False)
        return out.logits.float().softmax(-1)

    return fn


def from_encoder(model: Any, decoder_ids: Tensor) -> Distributions:
    """Encoder outputs ``(K, S, C)`` to the distributions ``(K, T, V)`` of one forced target."""
    from transformers.modeling_outputs import BaseModelOutput

    def fn(x: Tensor) -> Tensor:
        forced = decoder_ids.expand(x.shape[0], -1)
        given = BaseModelOutput(last_hidden_state=x)  # type: ignore[arg-type]
        out = model(encoder_outputs=given, decoder_input_ids=forced, use_cache=False)
        return out.logits.float().softmax(-1)

    return fn


def cross_attention_saliency(
    model: Any,
    ids: Tensor,
    decoder_ids: Tensor,
    *,
    n_masks: int = 2000,
    p: float = 0.5,
    score: Score = "kl",
    normalize: bool = True,
    generator: torch.Generator | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> CrossAttentionSaliency:
    """Occlude the source of one pair at the input and at the encoder's output, and hold every
    cross-attention map against both.

    An occluded element's vector is 0; its position stays. ``2 n_masks`` passes, of which half run
    the decoder only.

    Args:
        model: a transformers encoder-decoder.
        ids: source tokens ``(1, S)``, without padding.
        decoder_ids: what the decoder is given, ``(1, T)``: the start token, then the target.
        n_masks, p, score, generator, batch, progress: as for
            :func:`~regard.probe.cross_attention_saliency.occlusion_saliency`.
        normalize: as for :func:`~regard.probe.cross_attention_saliency.attention_agreement`.
    """
    for name, x in (("ids", ids), ("decoder_ids", decoder_ids)):
        if x.dim() != 2 or x.shape[0] != 1 or x.shape[1] == 0:
            raise ValueError(
                f"cross_attention_saliency: {name} must be (1, length), got {tuple(x.shape)}"
            )
    attention = cross_attention_maps(model, ids, decoder_ids)[0]
    with torch.no_grad(), _evaluated(model):
        embedded = model.get_input_embeddings()(ids)[0]
        fn = from_embeddings(model, decoder_ids)
        options: dict[str, Any] = {
            "n_masks": n_masks,
            "p": p,
            "score": score,
            "generator": generator,
            "batch": batch,
            "progress": progress,
        }
        at_input = occlusion_saliency(fn, embedded, **options)
        hidden = model.get_encoder()(inputs_embeds=embedded[None]).last_hidden_state[0]
        at_encoder = occlusion_saliency(from_encoder(model, decoder_ids), hidden, **options)
        likeliest = fn(embedded[None])[0].argmax(-1)
        gradient = gradient_saliency(fn, embedded, likeliest)
    maps = (at_input, at_encoder, gradient)
    rows: list[tuple[Any, ...]] = []
    for name, reduce in (("head", ()), ("layer", ("head",)), ("all", ("head", "layer"))):
        rho = [attention_agreement(attention, x, reduce, normalize=normalize) for x in maps]
        for at in product(*map(range, rho[0].shape)):
            layer, head = (*at, -1, -1)[:2]
            rows.append((name, layer, head, *(float(one[at]) for one in rho)))
    columns = ("maps", "layer", "head", "rho_input", "rho_encoder", "rho_gradient")
    table = Table(columns, tuple(rows))
    return CrossAttentionSaliency(table, attention, *maps)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: dropout would pass for saliency."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
