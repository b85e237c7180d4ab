"""LightNet: linear attention whose decay is additive, so that one scan is enough.

Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", arXiv
2405.21022. For every key channel, with `δ_t = exp(k_t)` and the mass `Δ_t = sum_{s <= t} δ_s`,

    S_t = (Δ_{t-1} / Δ_t) S_{t-1} + (δ_t / Δ_t) v_t^T        o_t = scale * S_t^T q_t

hence `S_t = sum_{s <= t} softmax_{s <= t}(k)_s v_s^T`: keys are weighed by a softmax over the tokens.
In logs, `z_t = log Δ_t`, this is :func:`regard.core.recur.recur` with the log-decay `z_{t-1} - z_t` and
keys `exp(k_t - z_t)`. Seen both ways the weights do not depend on the order of the tokens, and one
product serves any number of axes, where a multiplicative decay needs a scan for every direction.

Two conventions exist. flash-linear-attention starts the mass at 0 (the first token gets all the weight)
and scales by `K^{-1/2}`; the first author's code (Doraemonzzz/xmixers) starts it at 1 and does not
scale. `initial_mass` and `scale` choose; the defaults are the former. The named official repository
was not to be had, so this follows those two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.card import Card
from regard.core.call import compute_dtype
from regard.core.recur import recur

from .tnl_lrpe import lrpe

CARD = Card(
    key="lightnet",
    title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    arxiv="2405.21022",
    family="linear",
    entry="regard.linear.lightnet:lightnet_attention",
    definition="tests/linear/test_lightnet.py::test_is_a_softmax_over_the_tokens_so_far",
    oracle="python -m tests.golden tests/golden/data/lightnet.npz",
    claim="python -m benchmarks.lightnet --only scan_order",
    cost="python -m benchmarks.lightnet --only growth",
    note="Formulas of flash-linear-attention and of the first author's xmixers; the layer is "
    "regard.linear.lightnet_layer:LightNetAttention.",
)

# Stands for the logarithm of no mass: below any logit, and finite, so that gradients stay numbers.
_NONE = -1e30


class LightNetState(NamedTuple):
    """What has been seen.

    Attributes:
        memory: `S`, `(B, Hkv, K, V)`, with angles `(B, Hkv, 2 K, V)`.
        mass: `z = log Δ`, `(B, Hkv, K)` in float64: increments of a long stream are small.
    """

    memory: Tensor
    mass: Tensor


def additive_gate(k_logits: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, log-decays and mass of the additive recurrence (arXiv 2405.21022, in logs).

    Args:
        k_logits: `(B, H, N, K)`; `-inf` for a token that is to be skipped.
        mass: `z` of the tokens before, `(B, H, K)`, `-inf` for none.

    Returns:
        keys `exp(k_t - z_t)` and log-decays `z_{t-1} - z_t` `(B, H, N, K)`, and `z_N` `(B, H, K)`
        in the dtype of `mass`. The decay is 0 (nothing fades) while there is no mass.
    """
    dtype = compute_dtype(k_logits.dtype)
    # Measured from the mass before, which keeps what little a token adds to a large one.
    none = mass == -torch.inf
    reference = mass.masked_fill(none, 0)
    start = torch.zeros_like(reference).masked_fill(none, _NONE).to(dtype)
    logits = (k_logits.to(dtype) - reference.to(dtype)[:, :, None]).clamp(min=_NONE)
    z = torch.cat([start[:, :, None], logits], dim=2).logcumsumexp(2)
    before, after = z[:, :, :-1], z[:, :, 1:]
    decay = (before - after).masked_fill(before <= _NONE / 2, 0).clamp(max=0)
    keys = (logits - after).exp().masked_fill(logits <= _NONE / 2, 0)
    last = reference + z[:, :, -1].to(mass.dtype)
    return keys, decay, last.masked_fill(z[:, :, -1] <= _NONE / 2, -torch.inf)


def lightnet_attention(
    q: Tensor,
    k_logits: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    initial_mass: int = 0,
    scale: float | None = None,
    angles: Tensor | None = None,
    mask: Tensor | None = None,
    state: LightNetState | None = None,
    chunk: int = 64,
    return_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Additive linear attention, causal or over all tokens in one pass.

    Args:
        q: `(B, H, N, K)`, after its activation (the paper's is SiLU).
        k_logits: `(B, Hkv, N, K)`, before any activation: the weights are their exponentials.
        v: `(B, Hkv, N, V)`.
        causal: without it `O = scale * Q softmax_tokens(K)^T V`.
        initial_mass: 0, or 1 for a mass of 1 before the first token, which dampens early outputs.
        scale: default `K ** -0.5`.
        angles: of LRPE, broadcasting to `(B, H, N, K)` and to the keys; turns `q` and the weighted
            keys (:mod:`regard.linear.lightnet_pe`).
        mask: `(B, N)` bool, True for tokens; padding is skipped, and rows that have seen nothing
            are zero.
        state: of the tokens before; it holds their mass, so `initial_mass` has no more effect.
        chunk: tokens a chunk; it changes speed, not the result.
        return_state: also return the new :class:`LightNetState`.
        backend: as for :func:`regard.core.recur.recur`.

    Returns:
        `(B, H, N, V)` in the dtype of `q`, and with `return_state` the state.

    Raises:
        ValueError: shapes that do not fit, logits that leave a channel without any mass, or a
            state without causality.
    """
    # The checks look at values and the backward pass runs autograd itself: nothing to be traced.
    run = torch.compiler.disable(_attend) if torch.compiler.is_compiling() else _attend
    return run(
        q,
        k_logits,
        v,
        causal,
        initial_mass,
        scale,
        angles,
        mask,
        state,
        chunk,
        return_state,
        backend,
    )


def _attend(
    q: Tensor,
    k_logits: Tensor,
    v: Tensor,
    causal: bool,
    initial_mass: int,
    scale: float | None,
    angles: Tensor | None,
    mask: Tensor | None,
    state: LightNetState | None,
    chunk: int,
    return_state: bool,
    backend: str,
) -> Any:
    if q.dim() != 4 or k_logits.dim() != 4:
        raise ValueError(
            "lightnet_attention: q and k_logits must be (batch, heads, length, width), got "
            f"{tuple(q.shape)} and {tuple(k_logits.shape)}"
        )
    if initial_mass not in (0, 1):
        raise ValueError(f"lightnet_attention: initial_mass must be 0 or 1, got {initial_mass}")
    if not causal and (state is not None or return_state):
        raise ValueError("lightnet_attention: causal=False has no state")
    b, n = k_logits.shape[0], k_logits.shape[2]
    mass = _mass(state, k_logits, initial_mass)
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != (b, n):
            raise ValueError(
                f"lightnet_attention: mask must be bool {(b, n)}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        k_logits = k_logits.masked_fill(~mask[:, None, :, None], -torch.inf)
        v = v.masked_fill(~mask[:, None, :, None], 0)
    _check_mass(k_logits, mass, mask, causal)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    decay = None
    if causal:
        keys, decay, mass = additive_gate(k_logits, mass)
    else:
        keys = _over_all(k_logits, mass)
    query = q
    if angles is not None:
        query, keys = lrpe(q, angles), lrpe(keys, angles)
        decay = None if decay is None else torch.cat([decay, decay], dim=-1)
    if not causal:
        return recur(query, keys, v, scale=scale, causal=False, backend=backend)
    out, memory = recur(
        query,
        keys,
        v,
        decay=decay,
        scale=scale,
        state=None if state is None else state.memory,
        chunk=chunk,
        return_state=True,
        backend=backend,
    )
    return (out, LightNetState(memory, mass)) if return_state else out


def _mass(state: LightNetState | None, k_logits: Tensor, initial_mass: int) -> Tensor:
    """`z` before the first token, `(B, H, K)`."""
    b, heads, _, width = k_logits.shape
    if state is None:
        # Apple's GPUs have no float64.
        wide = torch.float32 if k_logits.device.type == "mps" else torch.float64
        start = 0.0 if initial_mass else -torch.inf
        return torch.full((b, heads, width), start, dtype=wide, device=k_logits.device)
    if tuple(state.mass.shape) != (b, heads, width):
        raise ValueError(
            f"lightnet_attention: state.mass must be {(b, heads, width)}, got "
            f"{tuple(state.mass.shape)}"
        )
    return state.mass


def _check_mass(k_logits: Tensor, mass: Tensor, mask: Tensor | None, causal: bool) -> None:
    """Raise ``ValueError`` where a token's key logits add up to no mass, or are no numbers."""
    logits = k_logits.detach()
    if bool(logits.isfinite().all()):
        return
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise ValueError("lightnet_attention: k_logits holds NaN or +inf")
    empty = logits == -torch.inf
    empty = empty.cummin(2).values if causal else empty.all(2, keepdim=True).expand(logits.shape)
    empty = empty & (mass == -torch.inf)[:, :, None]
    if mask is not None:
        empty = empty & mask[:, None, :, None]
    if bool(empty.any()):
        raise ValueError(
            "lightnet_attention: k_logits is -inf for a whole prefix of tokens, which leaves a key "
            "channel without mass; expected a finite logit, initial_mass=1, or a mask"
        )


def _over_all(k_logits: Tensor, mass: Tensor) -> Tensor:
    """Softmax over the tokens, with the initial mass in the denominator; zeros where none is."""
    logits = k_logits.to(compute_dtype(k_logits.dtype)).clamp(min=_NONE)
    start = mass.to(logits.dtype).clamp(min=_NONE)[:, :, None]
    total = torch.cat([start, logits], dim=2).logsumexp(2, keepdim=True)
    return (logits - total).exp().masked_fill(logits <= _NONE / 2, 0)
