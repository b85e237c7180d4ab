"""EE-MLLM's composite attention: image tokens are keys and values, but no queries over each other.

"EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model", arXiv 2408.11795. Text
rows attend to the image and to the text with the model's own weights; the products among image tokens,
most of a prompt's, are left out.

The paper could not be read in full; the mechanism follows summaries that agree. What becomes of the
image tokens themselves is not settled by them, so it is an option: ``"self"`` (each attends to itself
alone, then its feed-forward), ``"mlp"`` (feed-forward only) or ``"none"`` (frozen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from regard.card import Card

from ..core.attend import attend
from ..core.masks import Causal, Mask, Shifted, SlidingWindow
from ..core.rectangle_mask import Rectangles
from ..models.calls import AttentionCall
from ..models.edit import Edit, In, Site
from ..models.method import Method, both
from ..models.spans import Range

CARD = Card(
    key="ee-mllm",
    title="EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model",
    arxiv="2408.11795",
    family="steer",
    entry="regard.steer.ee_mllm:EEMLLM",
    definition="tests/steer/test_ee_mllm.py::test_fast_form_is_dense_attention_under_the_mask",
    oracle="tests/steer/test_ee_mllm.py::test_limits_are_pytorchs_attention",
    claim="python -m benchmarks.ee_mllm --only pairs",
    cost="python -m benchmarks.ee_mllm --only growth",
    note="From summaries; how image tokens are updated is UNVERIFIED and an option (self, mlp, none), "
    "as is the choice of layers of the paper's F variant (patch(..., layers=...)).",
)

Sees: TypeAlias = Literal["self", "nothing"]
Update: TypeAlias = Literal["self", "mlp", "none"]


def _one_of(name: str, value: str, options: object) -> None:
    if value not in get_args(options):
        raise ValueError(f"ee_mllm: {name} must be one of {get_args(options)}, got {value!r}")


def image_alone(image: Sequence[Range], sees: Sees = "self") -> Mask:
    """Rows of the image see themselves alone, or nothing; all other rows see everything.

    Args:
        image: ranges of positions.
        sees: what a row of the image sees.
    """
    _one_of("sees", sees, Sees)
    others = ~Rectangles(queries=image)
    return others | SlidingWindow(0) if sees == "self" else others


def composite_mask(n: int, image: Range, image_sees: Sees = "self") -> Tensor:
    """Which pairs may attend, bool ``(N, N)``: causal for text, ``image_sees`` for the image.

    Raises:
        ValueError: the range does not lie inside the sequence, or an unknown ``image_sees``.
    """
    if not 0 <= image[0] <= image[1] <= n:
        raise ValueError(f"composite_mask: image {image} does not lie inside {n} tokens")
    return (Causal() & image_alone((image,), image_sees)).dense(n)


def composite_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image: Sequence[Range],
    sees: Sees = "self",
    scale: float | None = None,
) -> Tensor:
    """Attention under the composite mask without any product of a row of the image.

    Args:
        q: ``(B, H, N, D)``; k ``(B, Hkv, N, D)``; v ``(B, Hkv, N, Dv)``.
        image: ranges in ascending order. Their rows of ``q`` are not read.
        sees: ``"self"``: the output of a row of the image is its own value; ``"nothing"``: zeros.
        scale: default ``D ** -0.5``.

    Returns:
        ``(B, H, N, Dv)``; ``O(T (I + T) D)`` for T text rows.
    """
    _one_of("sees", sees, Sees)
    n = k.shape[2]
    parts, end = [], 0
    for start, stop in [*image, (n, n)]:
        if not end <= start <= stop <= n:
            raise ValueError(
                f"composite_attention: image {list(image)}, expected ascending ranges within {n}"
            )
        if start > end:
            text = attend(
                q[:, :, end:start], k[:, :, :start], v[:, :, :start], mask=Causal(), scale=scale
            )
            parts.append(text)
        if stop > start:
            own = v[:, :, start:stop].repeat_interleave(q.shape[1] // k.shape[1], 1)
            parts.append(own if sees == "self" else torch.zeros_like(own))
        end = stop
    return torch.cat(parts, 2)


class CompositeAttention(nn.Module):
    """Self-attention of a sequence with images, for models that are built with it.

    Image rows have no queries; their output is ``W_o W_v x`` for ``update="self"``, else 0.

    Args:
        width: C, a multiple of ``heads``.
        heads, kv_heads: ``kv_heads`` (default ``heads``) divides ``heads``.
        update: see the module; ``"mlp"`` and ``"none"`` differ outside of the attention only.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, update: Update = "self"
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _one_of("update", update, Update)
        if heads < 1 or width % heads or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"CompositeAttention: width {width}, heads {heads}, kv_heads {kv_heads}, expected "
                "multiples"
            )
        self.heads, self.kv_heads, self.update = heads, kv_heads, update
        size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, image: Sequence[Range]) -> Tensor:
        """``x`` ``(B, N, C)`` with images at these ranges; the same shape."""
        k, v = (
            proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        text = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        for start, stop in image:
            text[start:stop] = False
        # Only text rows are projected; the places of the others are never read.
        q = x.new_zeros(x.shape).index_copy(
            1, text.nonzero().flatten(), self.q_proj(x[:, text]).to(x.dtype)
        )
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = composite_attention(q, k, v, image, "self" if self.update == "self" else "nothing")
        return self.o_proj(out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class EEMLLM(Method):
    """Composite attention in a running model.

        with regard.patch(model, EEMLLM(), spans=Spans.of(image=(35, 611))):
            model.generate(**inputs)

    Rows of the image see themselves alone (positions stay those of the full sequence); the other rows,
    generated ones among them, read them as ever. Decoding over the cache is what one pass computes.
    The mask has a closed form, so that blocks of image rows are skipped. An empty span changes nothing.

    Attributes:
        update: ``"self"``, ``"mlp"`` (the attention adds nothing to image rows) or ``"none"`` (nor
            does the feed-forward: they stay what they were before the first patched layer).
        image: name of the image's span.

    Raises:
        ValueError: an unknown ``update``; while running: no such span.
    """

    update: Update = "self"
    image: str = "image"

    def __post_init__(self) -> None:
        _one_of("update", self.update, Update)

    def edits(self) -> Sequence[Edit]:
        """What image rows do not take part in adds nothing to them."""
        sites: dict[str, tuple[Literal["attn", "mlp"], ...]] = {
            "self": (),
            "mlp": ("attn",),
            "none": ("attn", "mlp"),
        }
        return [Edit(site, _nothing, rows=In(self.image)) for site in sites[self.update]]

    def mask(self, pattern: Mask, call: AttentionCall) -> Mask:
        """The model's pattern without what image rows would read."""
        if call.spans is None:
            raise ValueError(
                f"EEMLLM: no span {self.image!r}; give patch(..., "
                f"spans=Spans.of({self.image}=(start, stop)))"
            )
        call.spans.end(self.image)
        image = tuple(r for r in call.spans.ranges[self.image] if r[1] > r[0])
        if not image:
            return pattern
        alone = image_alone(image)
        return both(pattern, Shifted(alone, call.own.offset) if call.own.offset else alone)


def _nothing(x: Tensor, site: Site) -> Tensor:
    return torch.zeros_like(x)
