"""Lightning Attention-2: linear attention with a fixed decay a head, tile by tile.

Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large
Language Models", arXiv 2401.04658. With the slope `m_h` of a head,

    o_t = sum_{s <= t} exp(-m_h (t - s)) (q_t · k_s) v_s

There is no softmax, no scale and no normaliser. Inside a tile of `c` tokens the masked quadratic form
is taken, between tiles a state `K^T V` is handed on (Algorithm 1), so that a token costs the same
however long the sequence is: that is :func:`regard.core.recur.recur` with one constant decay a head,
whose backward pass runs from the last tile to the first as the paper's does (Algorithm 2).

The paper's powers of the decay run 1..c for queries and 0..c-1 from a tile's end for keys, the
released kernel shifts both by one; both are the same function, and this one.

Packed sequences: :func:`regard.core.recur_packed.recur_packed` with `decay=-slopes`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.card import Card
from regard.core.recur import recur

CARD = Card(
    key="lightning2",
    title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large "
    "Language Models",
    arxiv="2401.04658",
    family="linear",
    entry="regard.linear.lightning2:lightning_attention",
    definition="tests/linear/test_lightning2.py::test_is_the_masked_quadratic_form",
    oracle="python -m tests.golden tests/golden/data/lightning2.npz",
    claim="python -m benchmarks.lightning2 --only per_token",
    cost="python -m benchmarks.lightning2 --only growth",
)


def decay_slopes(heads: int, layer: int | None = None, num_layers: int | None = None) -> Tensor:
    """The slopes `m_h` of the authors' models, `(heads,)` in float64.

    `2^(-8 h / H)` for `h = 1 .. H` where `H` is a power of two. Otherwise those of the power of two
    `p` below, followed by every second one of `2 p`, as in ALiBi (arXiv 2108.12409).

    Args:
        heads: `H`.
        layer: 0 .. num_layers - 1; multiplies the slopes by `1 - layer / (num_layers - 1) + 1e-5`,
            so that the last layer hardly decays (TransNormerLLM's released code). Default: 1.
        num_layers: at least 2, needed with `layer`.

    Raises:
        ValueError: a number out of range, or only one of `layer` and `num_layers`.
    """
    if heads < 1:
        raise ValueError(f"decay_slopes: heads must be >= 1, got {heads}")
    below = 1 << (heads.bit_length() - 1)
    exponents = [8 * (h + 1) / below for h in range(below)]
    exponents += [8 * (2 * h + 1) / (2 * below) for h in range(heads - below)]
    slopes = torch.tensor([2.0**-x for x in exponents], dtype=torch.float64)
    if layer is None and num_layers is None:
        return slopes
    if layer is None or num_layers is None or num_layers < 2 or not 0 <= layer < num_layers:
        raise ValueError(
            "decay_slopes: layer must be in 0 .. num_layers - 1 and num_layers >= 2, got layer "
            f"{layer} and num_layers {num_layers}"
        )
    return slopes * (1 - layer / (num_layers - 1) + 1e-5)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    state: Tensor | None = None,
    chunk: int = 64,
    return_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Linear attention with a constant decay a head (arXiv 2401.04658, Algorithm 1).

    Args:
        q: `(B, H, N, D)`.
        k, v: `(B, Hkv, N, D)` and `(B, Hkv, N, E)`.
        slopes: `m >= 0`, `(H,)` or `(H, 1, 1)` (or as many as `Hkv`), see :func:`decay_slopes`.
            Default: no decay.
        mask: `(B, N)` bool, True for tokens. Padding is skipped: it writes nothing, and the
            decay does not count it.
        causal: without it every token sees all of them, weighed by their distance on either side.
        state: `(B, H, D, E)`, `K^T V` of the tokens before (`Hkv` heads where neither `slopes` nor
            `mask` has more), default zeros.
        chunk: tokens a tile; it changes speed, not the result.
        return_state: also return the state, in float32 (float64 for float64 input).
        backend: as for :func:`regard.core.recur.recur`.

    Returns:
        `(B, H, N, E)` in the dtype of `q`, and with `return_state` the state.

    Raises:
        ValueError: negative slopes, or shapes that do not fit.
    """
    decay = None if slopes is None else -_slopes(slopes, q, k)
    if mask is not None:
        k, v, decay = _skip(mask, k, v, decay)
    return recur(
        q,
        k,
        v,
        decay=decay,
        state=state,
        chunk=chunk,
        causal=causal,
        return_state=return_state,
        backend=backend,
    )


def _slopes(slopes: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Slopes as `(heads,)` on the device of `q`."""
    counts = tuple(dict.fromkeys(x.shape[1] for x in (q, k) if x.dim() == 4))
    heads = slopes.shape[0] if slopes.dim() else 0
    if heads not in counts or slopes.shape not in ((heads,), (heads, 1, 1)):
        raise ValueError(
            f"lightning_attention: slopes must be (H,) or (H, 1, 1) for H heads of {counts}, got "
            f"{tuple(slopes.shape)}"
        )
    # Under the compiler recur does the same check, of what it calls decay.
    if not torch.compiler.is_compiling() and slopes.numel() and float(slopes.detach().min()) < 0:
        raise ValueError(
            f"lightning_attention: slopes must be >= 0, got down to {float(slopes.min()):.4g}"
        )
    return slopes.reshape(heads).to(q.device)


def _skip(
    mask: Tensor, k: Tensor, v: Tensor, decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values without padding, and a decay for every token that is none for padding."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"lightning_attention: mask must be bool {(k.shape[0], k.shape[2])}, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    padding = ~mask[:, None, :, None]
    if decay is not None:
        decay = torch.where(mask[:, None], decay[:, None], 0.0)
    return k.masked_fill(padding, 0), v.masked_fill(padding, 0), decay
