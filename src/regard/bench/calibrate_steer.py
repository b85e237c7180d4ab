"""Calibrations of steering methods: heads, dimensions and directions of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models import drop_span, patch
from ..steer.act import ACT
from ..steer.act_heads import calibrate_heads, helpful_heads
from ..steer.var import VAR, default_tau
from ..steer.var_dims import massive_dims, massive_values
from ..steer.vhr_branches import calibrate_vhr, vhd
from ..steer.vista import NormPreservingSteer, last_hidden, steering_direction
from .calibrate_given import IMAGE, Given, Made
from .quality import predict, prefill


def act(
    given: Given,
    *,
    margin: float = 0.0,
    beta: float = 0.4,
    threshold: float = 0.1,
    keep_first: bool = True,
    min_rows: int = 1,
    per_length: bool = False,
    causal: bool = False,
) -> Made:
    """Heads that lower the text's next-token loss by more than ``margin`` when ACT edits them alone."""
    if margin < 0:
        raise ValueError(f"calibrate: margin must be >= 0, got {margin}")
    knobs = ACT(beta, threshold, keep_first, min_rows, per_length, causal=causal)
    given.fits(given.ids.shape[1])
    change = calibrate_heads(
        given.model,
        lambda model: loss(model, given.ids),
        given.layers,
        act=knobs,
        progress=given.progress,
    )
    tried = int((~change.isnan()).sum())
    heads = helpful_heads(change, margin)
    if not heads:
        raise ValueError(
            f"calibrate: none of {tried} heads lowers the loss by more than {margin}; try other "
            "layers or settings, or another text"
        )
    method = replace(knobs, heads=heads, made_for=given.made_for)
    together = {}
    for name, ids in (("text", given.ids), ("after", given.after)):
        if ids is not None:
            together[name] = {"before": loss(given.model, ids)}
            with patch(given.model, method):
                together[name]["after"] = loss(given.model, ids)
    return method.save, {
        "heads": [
            {"layer": layer, "head": head, "change": float(change[layer, head])}
            for layer, head in heads
        ],
        "tried": tried,
        "change": [[None if x != x else x for x in row] for row in change.tolist()],
        "loss": together,
    }


def var(
    given: Given,
    *,
    tau: float | None = None,
    share: float = 0.5,
    rho: float = 0.5,
    min_sum: float = 0.2,
    p: float = 0.6,
    without: str = "nothing",
) -> Made:
    """Dimensions in which the text's tokens have massive activations."""
    given.fits(given.ids.shape[1])
    # The knobs are checked before the work.
    knobs = VAR((0,), tau, rho, min_sum, p, without, given.layers)  # type: ignore[arg-type]
    peaks = massive_values(given.model, given.ids)
    dims = massive_dims(peaks, tau=tau, share=share)
    limit = default_tau(peaks.shape[1], tau)

    def told(dimension: int) -> dict[str, Any]:
        x = peaks[:, dimension]
        return {
            "dimension": dimension,
            "mean": float(x.mean()),
            "largest": float(x.max()),
            "layers": float((x > limit).double().mean()),
        }

    others = [d for d in peaks.mean(0).argsort(descending=True).tolist() if d not in dims]
    return replace(knobs, dims=dims, made_for=given.made_for).save, {
        "dims": [told(dimension) for dimension in dims],
        "next": told(others[0]) if others else None,
        "tau": limit,
    }


def vhr(given: Given, *, alpha: float = 2.0, outlier: bool = True, rows: str = "answer") -> Made:
    """Heads whose output changes most without the context, layer by layer (Algorithm 1)."""
    assert given.spans is not None
    method = calibrate_vhr(
        given.model,
        given.ids,
        given.spans,
        alpha=alpha,
        layers=given.layers,
        outlier=outlier,
        rows=rows,  # type: ignore[arg-type]
        image=IMAGE,
    )
    assert method.heads is not None
    divergence = vhd(given.model, given.ids, given.spans, IMAGE)[0]
    return replace(method, made_for=given.made_for).save, {
        "heads": [
            {"layer": layer, "heads": row.nonzero().flatten().tolist()}
            for layer, row in enumerate(method.heads[0])
            if bool(row.any())
        ],
        "divergence": divergence.tolist(),
    }


def vista(given: Given, *, lam: float = 0.17, compat: bool = False) -> Made:
    """The direction of every layer: what the context adds to the prompt's last token."""
    assert given.spans is not None
    short = drop_span(given.ids, given.spans, IMAGE)[0]
    negative, positive = (last_hidden(given.model, ids) for ids in (short, given.ids))
    v = steering_direction(negative, positive, compat)
    norms, hidden = v.norm(dim=-1), positive[0].norm(dim=-1)
    return NormPreservingSteer(v, lam, given.layers, made_for=given.made_for).save, {
        "layers": [
            {"layer": layer, "norm": float(norm), "share": float(norm / hidden[layer])}
            for layer, norm in enumerate(norms)
            if given.layers is None or layer in given.layers
        ]
    }


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Mean next-token loss of a text, nats a token."""
    return float(predict(model, prefill(model, ids)[0], ids).nll.double().mean())
