"""From what transformers says about a mask to a :class:`regard.Mask`, never through N x N.

transformers describes a mask by a function of indices (``masking_utils``), a 2-D padding mask and
offsets. Known functions become closed masks; any other becomes a :class:`Predicate` that evaluates
the function itself, which is exact and only slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as hf

from ..core.data_masks import Documents, Keys
from ..core.masks import Causal, Full, Index, Mask, Predicate, SlidingWindow

MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class OwnMask:
    """The model's own mask of one call, in the call's positions (row ``r`` is ``r + M - N``).

    Attributes:
        pattern: everything but padding.
        valid: keys that are not padding, bool ``(B, M)``, or ``None`` when all are real.
        start: where each sequence starts among the model's columns: ``(B,)`` for left padding,
            ``(B, M)`` for packed sequences, ``None`` when all start at 0.
        offset: column of the first key.
        keys: how many of the given keys are used; a static cache is longer than what is filled.
    """

    pattern: Mask
    valid: Tensor | None
    start: Tensor | None
    offset: int
    keys: int

    def padded(self, pattern: Mask) -> Mask:
        """``pattern`` without the padded keys."""
        return pattern if self.valid is None else pattern & Keys(self.valid)


@dataclass(frozen=True)
class _Frame:
    """The offsets and sizes that translating a function needs."""

    batch: int
    n: int
    m: int
    q_offset: int
    kv_offset: int
    device: torch.device

    @property
    def aligned(self) -> bool:
        return self.q_offset - self.kv_offset == self.m - self.n


def own_mask(arguments: dict[str, Any]) -> OwnMask:
    """Translate the keyword arguments of a transformers mask function."""
    given: Tensor | None = arguments.get("attention_mask")
    n, m = int(arguments["q_length"]), int(arguments["kv_length"])
    q_offset, kv_offset = int(arguments.get("q_offset", 0)), int(arguments.get("kv_offset", 0))
    function: MaskFunction = arguments.get("mask_function", hf.causal_mask_function)
    device = torch.device(arguments.get("device", "cpu"))
    filled = q_offset + n - kv_offset
    if 0 < filled < m and _holds_causal(function):
        m = filled  # a static cache: what lies beyond the last query is not written yet
    frame = _Frame(int(arguments["batch_size"]), n, m, q_offset, kv_offset, device)

    pattern = _known(function, frame)
    if pattern is None:
        pattern = _evaluated(function, frame, vmap=bool(arguments.get("use_vmap", False)))
    start = _packed_starts(function)
    valid = None
    if given is not None:
        given = given.to(device=device, dtype=torch.bool)
        if not bool(given.all()):
            missing = kv_offset + m - given.shape[-1]
            padded = torch.nn.functional.pad(given, (0, max(missing, 0)))
            valid = padded[:, kv_offset : kv_offset + m]
            left = (given.cumsum(-1) == 0).sum(-1)
            start = left if bool((left > 0).any()) else start
    return OwnMask(pattern, valid, start, kv_offset, m)


def _name(function: MaskFunction) -> str:
    """The name of the factory that made a closure of masking_utils, or of the function itself."""
    if getattr(function, "__module__", None) != hf.__name__:
        return ""
    return str(getattr(function, "__qualname__", "")).split(".")[0]


def _inside(function: MaskFunction, variable: str) -> Any:
    """A variable that the closure holds."""
    return inspect.getclosurevars(function).nonlocals[variable]


def _parts(function: MaskFunction) -> tuple[MaskFunction, ...]:
    """The conjuncts of a function."""
    if _name(function) != "and_masks":
        return (function,)
    flat: list[MaskFunction] = []
    for part in _inside(function, "mask_functions"):
        flat.extend(_parts(part))
    return tuple(flat)


def _holds_causal(function: MaskFunction) -> bool:
    if _name(function) in ("and_masks", "or_masks"):
        return any(_holds_causal(part) for part in _inside(function, "mask_functions"))
    return function is hf.causal_mask_function


def _packed(function: MaskFunction) -> tuple[Tensor, MaskFunction] | None:
    """Ids and inner function of a packed batch, or ``None``."""
    ids: Tensor | None = None
    inner: MaskFunction | None = None
    for part in _parts(function):
        if _name(part) == "packed_sequence_mask_function":
            ids = _inside(part, "packed_sequence_mask")
        elif _name(part) == "remap_positions_for_packed_sequence":
            inner = _inside(part, "mask_function")
    return None if ids is None or inner is None else (ids, inner)


def _packed_starts(function: MaskFunction) -> Tensor | None:
    packed = _packed(function)
    if packed is None:
        return None
    ids = packed[0]
    at = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    first = torch.nn.functional.pad(ids.diff(dim=-1) != 0, (1, 0), value=True)
    return torch.where(first, at, 0).cummax(-1).values


def _known(function: MaskFunction, at: _Frame) -> Mask | None:
    """The mask of a function of masking_utils in the call's positions, or ``None``."""
    packed = _packed(function)
    if packed is not None:
        ids, inner = packed
        # positions restart with every sequence, so only masks of distances survive the renumbering
        pattern = _known(inner, at)
        alike = pattern is not None and pattern.relative
        return Documents(ids.long()) & pattern if alike and pattern is not None else None
    name = _name(function)
    if name == "or_masks":
        options = [_known(part, at) for part in _inside(function, "mask_functions")]
        if any(option is None for option in options):
            return None
        result = options[0]
        for option in options[1:]:
            assert result is not None and option is not None
            result = result | option
        return result
    parts = _parts(function)
    if len(parts) > 1:
        return _conjunction(parts, at)
    if name == "bidirectional_mask_function":
        return Full()
    if not at.aligned:
        return None
    if name == "causal_mask_function":
        return Causal()
    if name == "sliding_window_overlay":
        # one-sided: whatever lies ahead is for the other conjuncts to forbid
        return SlidingWindow(_inside(function, "sliding_window") - 1, at.m)
    if name == "sliding_window_bidirectional_overlay":
        window = _inside(function, "sliding_window")
        return SlidingWindow(window, window)
    columns = torch.arange(at.kv_offset, at.kv_offset + at.m, device=at.device)
    if name == "chunked_overlay":
        size, left = _inside(function, "chunk_size"), _inside(function, "left_padding")
        chunks = (columns - left.to(at.device)[:, None]).div(size, rounding_mode="floor")
        return Documents(chunks - chunks.min())  # ids below 0 would be padding
    if name == "blockwise_overlay":
        ids = _inside(function, "block_sequence_ids").to(at.device).long()
        return Documents(ids[:, columns]) if ids.shape[-1] > int(columns[-1]) else None
    return None


def _conjunction(parts: tuple[MaskFunction, ...], at: _Frame) -> Mask | None:
    masks = [_known(part, at) for part in parts]
    windows = [p for p in parts if _name(p) == "sliding_window_overlay"]
    if at.aligned and len(windows) == 1 and hf.causal_mask_function in parts:
        left = _inside(windows[0], "sliding_window") - 1
        kept = [m for p, m in zip(parts, masks, strict=True) if p not in windows]
        masks = [*(m for m in kept if not isinstance(m, Causal)), SlidingWindow(left)]
    result: Mask = Full()
    for mask in masks:
        if mask is None:
            return None
        if not isinstance(mask, Full):
            result = mask if isinstance(result, Full) else result & mask
    return result


def _evaluated(function: MaskFunction, at: _Frame, vmap: bool) -> Mask:
    """A mask that calls the function itself, at the model's own indices."""
    q_shift = at.q_offset - (at.m - at.n)

    def broadcast(i: Tensor, j: Tensor, h: Index, b: Index) -> Tensor:
        # blocks reach beyond the last position; the function may index tensors of exactly this size
        q = i.clamp(at.m - at.n, at.m - 1) + q_shift
        kv = j.clamp(0, at.m - 1) + at.kv_offset
        tensors = (torch.as_tensor(b, device=q.device), torch.as_tensor(h, device=q.device))
        out: Tensor = function(*tensors, q, kv)
        return out.expand(torch.broadcast_shapes(out.shape, (q - kv).shape))

    def one_by_one(i: Tensor, j: Tensor, h: Index, b: Index) -> Tensor:
        q = i.clamp(at.m - at.n, at.m - 1) + q_shift
        kv = j.clamp(0, at.m - 1) + at.kv_offset
        head, entry = (torch.as_tensor(x, device=q.device) for x in (h, b))
        spread = torch.broadcast_tensors(entry, head, q, kv)
        with hf.TransformGetItemToIndex():
            flat: Tensor = torch.vmap(function)(*(x.reshape(-1) for x in spread))
        return flat.reshape(spread[0].shape)

    chosen = one_by_one if vmap and not _agree(broadcast, one_by_one, at) else broadcast
    return _PerBatch(chosen, at.batch)


def _agree(first: Callable[..., Tensor], second: Callable[..., Tensor], at: _Frame) -> bool:
    """Whether a user's function may be called with whole index tensors: tried on a few rows."""
    rows = torch.linspace(at.m - at.n, at.m - 1, min(at.n, 8), device=at.device).long()[:, None]
    keys = torch.linspace(0, at.m - 1, min(at.m, 64), device=at.device).long()[None]
    entry = torch.arange(at.batch, device=at.device).view(-1, 1, 1, 1)
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=at.device)
    try:
        tried = first(rows, keys, head, entry)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False  # a function of single indices, e.g. one that branches on them
    expected = second(rows, keys, head, entry)
    return bool(torch.equal(tried.expand_as(expected), expected))


@dataclass(frozen=True, eq=False)
class _PerBatch(Predicate):
    """A predicate that differs between batch entries."""

    entries: int = 1

    @property
    def batch(self) -> int | None:
        return self.entries
