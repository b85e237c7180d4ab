"""The one call: checks its input, plans, hands over to a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backends import backend as get_backend
from .backends.sdpa import plain
from .bias import Bias, as_bias
from .call import Call
from .layout import BlockLayout
from .masks import Full, Mask
from .windows import windows

# Block sides of layouts made from masks, by device type: measured, see benchmarks/core.py.
_BLOCK = {"cpu": (64, 64), "cuda": (128, 64)}
# Bands that list fewer keys a row are cut finer on a CPU: their edges weigh more than the overhead.
_NARROW = 512


@dataclass(frozen=True)
class Plan:
    """What :func:`attend` would do with a call.

    Attributes:
        backend: the backend's name.
        reason: why it was picked, in words.
        call: the checked call that the backend receives.
        factors: a low-rank bias that goes in as extra channels of q and k; ``call.bias`` is then
            None and ``call.scale`` 1.
        scale: the factor on ``q k^T`` that was asked for.
    """

    backend: str
    reason: str
    call: Call
    factors: tuple[Tensor, Tensor] | None
    scale: float

    @property
    def density(self) -> float | None:
        """Work in the layout or the windows over work in the dense call; None where there is neither."""
        work = self.call.windows or self.call.layout
        return None if work is None else work.density


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    layout: BlockLayout | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> Any:
    """Softmax attention: ``softmax(scale * q k^T + bias) v`` over the keys that a query may see.

    Args:
        q: queries ``(B, H, N, D)``. Row ``r`` is position ``r + M - N``, as in decoding.
        k: keys ``(B, Hkv, M, D)``; ``Hkv`` divides ``H`` (query head ``h`` reads ``h // (H / Hkv)``).
        v: values ``(B, Hkv, M, Dv)``.
        mask: where a query may look (default everywhere). Keyless rows give 0 and -inf.
        layout: key blocks to read; with ``mask`` both must allow a pair.
        bias: a :class:`~regard.core.bias.Bias` or a float tensor ``(N, M)``, ``(H, N, M)`` or
            ``(B, H, N, M)``, added after scaling.
        scale: factor on the scores, default ``D ** -0.5``.
        dropout: probability of dropping a weight, in [0, 1).
        return_lse: also return the natural log-sum-exp of every row.
        backend: ``"auto"`` or one of ``reference``, ``sdpa``, ``blocks``, ``flex``, ``triton``.
        generator: source of randomness for dropout.

    A key or a bias that is NaN or infinite spoils the rows that may see it and no others, on
    ``reference`` and ``blocks``; ``sdpa`` promises nothing. Values must be finite on every backend,
    hidden ones too, and so must everything that gradients pass through: a weight of 0 times NaN is NaN.
    Fill with zeros what a cache has not written yet.

    Returns:
        ``out`` ``(B, H, N, Dv)`` in the dtype of ``q``, and with ``return_lse`` also ``lse``
        ``(B, H, N)`` in float32 (float64 for float64 input).

    Raises:
        ValueError: an argument does not fit, or the named backend cannot serve the call.
    """
    chosen = plan(
        q,
        k,
        v,
        mask=mask,
        layout=layout,
        bias=bias,
        scale=scale,
        dropout=dropout,
        return_lse=return_lse,
        backend=backend,
        generator=generator,
    )
    return execute(q, k, v, chosen, return_lse)


def execute(q: Tensor, k: Tensor, v: Tensor, chosen: Plan, return_lse: bool) -> Any:
    """Carry out a plan made for these tensors."""
    dtype = q.dtype
    if chosen.factors is not None:
        q, k, v = _widen(q, k, v, chosen)
    out, lse = get_backend(chosen.backend).run(q, k, v, chosen.call)
    out = out.to(dtype)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _widen(q: Tensor, k: Tensor, v: Tensor, chosen: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """A low-rank bias as extra channels: ``[scale q | phi_q] [k | phi_k]^T`` (arXiv 2505.12044)."""
    assert chosen.factors is not None
    phi_q, phi_k = chosen.factors
    b, h, n, _ = q.shape
    rank, group = phi_q.shape[-1], h // k.shape[1]
    if phi_k.dim() > 2 and phi_k.shape[-3] not in (1, k.shape[1]):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    phi_q = phi_q.to(q.device).expand(b, h, n, rank)
    phi_k = phi_k.to(k.device).expand(b, k.shape[1], k.shape[2], rank)
    dtype = torch.promote_types(q.dtype, phi_q.dtype)
    wide_q = torch.cat([q.to(dtype) * chosen.scale, phi_q.to(dtype)], dim=-1)
    wide_k = torch.cat([k.to(dtype), phi_k.to(dtype)], dim=-1)
    return wide_q, wide_k, v.to(dtype)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    layout: BlockLayout | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> Plan:
    """Check a call and choose its backend; the arguments are those of :func:`attend`."""
    term = None if bias is None else as_bias(bias)
    _check(q, k, v, mask, layout, term, dropout)
    if layout is not None:
        layout = (layout if mask is None else layout.under(mask)).to(q.device)
        mask = layout.mask
    call = Call(
        mask=mask,
        layout=layout,
        bias=term,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        dropout=dropout,
        generator=generator,
        need_lse=return_lse,
    )
    factors = None
    if term is not None and backend != "reference":
        factors = term.factors(q.shape[2], k.shape[2])
    scale = call.scale
    if factors is not None:
        call = replace(call, bias=None, scale=1.0)
    if backend == "auto":
        name, reason, call = _choose(q, k, v, call)
    else:
        name, reason, call = backend, "asked for", _with_layout(q, k, call, backend)
        why_not = get_backend(backend).why_not(q, k, v, call)
        if why_not is not None:
            raise ValueError(f"attend: backend {backend!r} cannot serve this call: {why_not}")
    return Plan(name, reason, call, factors, scale)


def _choose(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[str, str, Call]:
    """The backend for a call by device, mask and layout, with the reason."""
    if q.numel() == 0 or k.shape[2] == 0:
        return "reference", "there is nothing to compute", call
    if call.layout is None and (kind := plain(call.mask, q.shape[2], k.shape[2])) is not None:
        why_not = get_backend("sdpa").why_not(q, k, v, call)
        if why_not is None:
            return "sdpa", f"PyTorch's fused kernel knows {kind} attention", call
    reasons = []
    for name in ("triton", "flex", "blocks") if q.is_cuda else ("blocks",):
        ready = _with_layout(q, k, call, name)
        why_not = get_backend(name).why_not(q, k, v, ready)
        if why_not is None:
            what = "listed blocks" if ready.windows is None else "tiles of the windows"
            reasons.append(f"computes only the {what}")
            return name, "; ".join(reasons), ready
        reasons.append(f"{name}: {why_not}")
    return "reference", "; ".join(reasons), call


def _with_layout(q: Tensor, k: Tensor, call: Call, name: str) -> Call:
    """The call with the layout, or the windows, that a block-sparse backend needs."""
    if call.layout is not None or name not in ("blocks", "flex", "triton"):
        return call
    n, m = q.shape[2], k.shape[2]
    if n == 0 or m == 0:
        return call
    mask = Full() if call.mask is None else call.mask
    if name == "blocks" and q.device.type == "cpu":
        tiles = windows(mask, n, m, len(k) * k.shape[1], q.shape[1] // k.shape[1])
        if tiles is not None:
            return replace(call, windows=tiles)
    bq, bk = _BLOCK.get(q.device.type, (128, 128))
    if name == "flex":
        bq = bk = 128
    elif name == "blocks":
        bq = min(bq, n)
    make = _cached_layout if mask.constant else Mask.layout
    layout = make(mask, n, m, (bq, bk), device=q.device)
    cpu = name == "blocks" and q.device.type == "cpu"
    if cpu and mask.relative and layout.density * m <= _NARROW:
        layout = make(mask, n, m, (min(32, n), 32), device=q.device)
    return replace(call, layout=layout)


@lru_cache(maxsize=64)
def _cached_layout(
    mask: Mask, n: int, m: int, block: tuple[int, int], *, device: torch.device
) -> BlockLayout:
    return mask.layout(n, m, block, device=device)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    layout: BlockLayout | None,
    bias: Bias | None,
    dropout: float,
) -> None:
    """Raise ``ValueError`` unless the arguments of :func:`attend` fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"attend: {name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"attend: {name} must be (batch, heads, length, width), got {tuple(x.shape)}"
            )
        if not x.dtype.is_floating_point:
            raise ValueError(f"attend: {name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"attend: {name} is {x.dtype}, but q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"attend: {name} is on {x.device}, but q is on {q.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"attend: {name} has batch {x.shape[0]}, but q has {q.shape[0]}")
    h, hkv, n, m = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attend: k has width {k.shape[3]}, but q has {q.shape[3]}")
    if q.shape[3] == 0:
        raise ValueError("attend: q has width 0")
    if v.shape[1] != hkv or v.shape[2] != m:
        raise ValueError(
            f"attend: v has {v.shape[1]} heads and {v.shape[2]} keys, but k has {hkv} and {m}"
        )
    if hkv == 0 or h % hkv:
        raise ValueError(f"attend: k has {hkv} heads, which does not divide q's {h}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"attend: dropout must lie in [0, 1), got {dropout}")
    if mask is not None:
        if not isinstance(mask, Mask):
            raise ValueError(
                f"attend: mask must be a regard Mask, got {type(mask).__name__}; "
                "wrap a bool tensor as Dense(tensor)"
            )
        mask.check(n, m, h, q.shape[0])
    if bias is not None:
        bias.check(n, m, h, q.shape[0])
    if layout is not None:
        _check_layout(layout, n, m, q.shape[0], h, hkv)


def _check_layout(layout: BlockLayout, n: int, m: int, b: int, h: int, hkv: int) -> None:
    if (layout.n, layout.m) != (n, m):
        raise ValueError(
            f"attend: the layout is for {layout.n} queries and {layout.m} keys, the call has {n} and {m}"
        )
    bl, hl = layout.index.shape[:2]
    if bl not in (1, b) or hl not in (1, hkv, h):
        raise ValueError(
            f"attend: the layout is for batch {bl} and {hl} heads, the call has batch {b}, "
            f"{h} query heads and {hkv} key heads"
        )
    if layout.mask is not None:
        layout.mask.check(n, m, h, b)
