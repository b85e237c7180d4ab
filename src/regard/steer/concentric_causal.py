"""Concentric causal attention: image tokens get positions by rings, and see each other by rings.

"Mitigating Object Hallucination via Concentric Causal Attention", arXiv 2410.15926. In raster order the
upper rows of an image stand hundreds of positions away from the question. Here all tokens of one ring
of the grid share a position, the border first and the centre last, so that an image of P x P tokens
takes P / 2 positions, and a token of the image sees its own ring and those outside of it.

Followed: xing0047/cca-llava, ``llava/cca_utils/cca.py``. The paper trains a model with this layout; on
a model that was not, it is an approximation. The code handles one image; here every image of the span
is laid out so, each range of the span being one image.

The rings are an order on one axis of positions. Where positions have several (Qwen2-VL: time, height,
width) an image's tokens stand at their row and column, so that P x P of them already take P positions;
neither paper nor code says which axis a ring would replace, and such positions are refused. Text that
stands in for an image has the same position on all axes, and is laid out on all of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from regard.card import Card

from ..core.masks import And, Causal, Index, Mask, Shifted
from ..models.calls import AttentionCall
from ..models.edit import Edit, Site
from ..models.method import Method
from ..models.spans import Range, Spans

CARD = Card(
    key="concentric-causal",
    title="Mitigating Object Hallucination via Concentric Causal Attention",
    arxiv="2410.15926",
    family="steer",
    entry="regard.steer.concentric_causal:ConcentricCausal",
    definition="tests/steer/test_concentric_causal.py::test_is_the_layout_written_out",
    oracle="python -m tests.golden tests/golden/data/concentric-causal.npz",
    claim="python -m benchmarks.concentric_causal --only invariance",
    cost="python -m benchmarks.concentric_causal --only growth",
    note="The paper trains with this layout; its accuracy figures need that training. Images whose "
    "positions have several axes (Qwen2-VL) are refused: the paper defines rings on one axis only.",
)


def concentric_positions(side: int) -> Tensor:
    """Ring of each cell of a grid (section 3.2): ``min(i, j, P-1-i, P-1-j)``, 0 at the border.

    Args:
        side: P, even and at least 2.

    Returns:
        int64 ``(P, P)`` with values 0 to ``P / 2 - 1``.

    Raises:
        ValueError: an odd side, whose centre is no ring.
    """
    if isinstance(side, bool) or not isinstance(side, int) or side < 2 or side % 2:
        raise ValueError(f"concentric_positions: side must be even and >= 2, got {side!r}")
    at = torch.arange(side)
    edge = torch.minimum(at, side - 1 - at)
    return torch.minimum(edge[:, None], edge)


def side_of(image: Range) -> int:
    """Side of the square grid that fills a range.

    Raises:
        ValueError: no grid of even side fills it.
    """
    cells = image[1] - image[0]
    side = isqrt(cells)
    if side * side != cells or side % 2:
        raise ValueError(
            f"concentric: image {image} holds {cells} tokens, expected the square of an even number"
        )
    return side


def concentric_shift(columns: Tensor, images: Sequence[Range]) -> Tensor:
    """What is added to the raster position of each column, int64 as ``columns``.

    Inside an image the token at place ``c`` of ring ``r`` moves by ``r - c``; everything behind an
    image moves by ``P / 2 - P^2``.
    """
    shift = torch.zeros_like(columns)
    for start, stop in images:
        if stop == start:
            continue
        side = side_of((start, stop))
        ring = concentric_positions(side).flatten().to(columns.device)
        place = columns - start
        inside = (place >= 0) & (columns < stop)
        at = place.clamp(0, side * side - 1)
        shift = shift + torch.where(inside, ring[at] - at, 0)
        shift = shift + torch.where(columns >= stop, side // 2 - side * side, 0)
    return shift


@dataclass(frozen=True)
class ConcentricMask(Mask):
    """Causal, but between two tokens of one image by rings: the key's ring is not further inside.

    Attributes:
        images: ranges of positions, each a square of even side in row-major order.

    Raises:
        ValueError: an image is no such square.
    """

    images: tuple[Range, ...]

    def __post_init__(self) -> None:
        for image in self.images:
            if image[1] > image[0]:
                side_of(image)

    constant = True

    def allows(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        out = j <= i
        for start, stop in self.images:
            if stop == start:
                continue
            ring = concentric_positions(side_of((start, stop))).flatten().to(i.device)
            both = (i >= start) & (i < stop) & (j >= start) & (j < stop)
            mine, theirs = (ring[(x - start).clamp(0, stop - start - 1)] for x in (i, j))
            out = torch.where(both, theirs <= mine, out)
        return out


def cca_layout(n: int, image: Range, side: int | None = None) -> tuple[Tensor, Tensor]:
    """Position ids and mask of a sequence with one image.

    Args:
        n: length of the sequence.
        image: half-open range of the image; ``side`` checks that it is a grid of that side.

    Returns:
        Position ids int64 ``(N,)`` and which pairs may attend, bool ``(N, N)``. The token after a
        cache of ``M`` keys has position ``M - P^2 + P / 2``.

    Raises:
        ValueError: the range is not inside the sequence or no square of even side.
    """
    start, stop = image
    if not 0 <= start <= stop <= n:
        raise ValueError(f"cca_layout: image {image} does not lie inside {n} tokens")
    if side is not None and side * side != stop - start:
        raise ValueError(f"cca_layout: image {image} is not a grid of side {side}")
    columns = torch.arange(n)
    positions = columns + concentric_shift(columns, [(start, stop)])
    return positions, ConcentricMask(((start, stop),)).dense(n)


@dataclass(frozen=True)
class ConcentricCausal(Method):
    """Concentric causal attention in a running model.

        with regard.patch(model, ConcentricCausal(), spans=Spans.of(image=(35, 611))):
            model.generate(**inputs)

    It replaces the position ids of every pass and the causal mask of the image's rows; the image is
    read in one pass (a prompt in pieces may be cut before and after it). Positions are baked into the
    keys of the KV cache: enter the patch before the prompt is read. An empty span changes nothing.

    Attributes:
        image: name of the image's span; each of its ranges is one square image of even side.

    Raises:
        ValueError: while running: no such span, a range that is no such square, a layer whose own
            mask is not causal (sliding windows), or position ids that differ between axes.
    """

    image: str = "image"

    def edits(self) -> Sequence[Edit]:
        """Position ids of all rows."""
        return [Edit("positions", self._move)]

    def mask(self, pattern: Mask, call: AttentionCall) -> Mask:
        """``pattern`` with its causal part replaced."""
        images = self._images(call.spans)
        if not images:
            return pattern
        parts = pattern.parts if isinstance(pattern, And) else (pattern,)
        if Causal() not in parts:
            raise ValueError(
                f"ConcentricCausal: layer {call.layer} attends by {pattern!r}, expected a causal layer"
            )
        _in_one_piece(images, call)
        rings: Mask = ConcentricMask(images)
        if call.own.offset:
            rings = Shifted(rings, call.own.offset)
        changed = [rings if part == Causal() else part for part in parts]
        return changed[0] if len(changed) == 1 else And(tuple(changed))

    def _move(self, positions: Tensor, site: Site) -> Tensor:
        images = self._images(site.spans)
        if not images:
            return positions
        if positions.dim() > 2 and bool((positions != positions[:1]).any()):
            raise ValueError(
                f"ConcentricCausal: position ids {tuple(positions.shape)} differ between axes: rings "
                "are defined for one axis (LLaVA), and the several axes of this model give an image's "
                "tokens their row and column already; use a model whose positions have one axis"
            )
        return positions + concentric_shift(site.rows.to(positions.device), images)

    def _images(self, spans: Spans | None) -> tuple[Range, ...]:
        if spans is None:
            raise ValueError(
                f"ConcentricCausal: no span {self.image!r}; give patch(..., "
                f"spans=Spans.of({self.image}=(start, stop)))"
            )
        spans.contains(self.image, torch.arange(0))  # names the span if it is missing
        return tuple((a, z) for a, z in spans.ranges[self.image] if z > a)


def _in_one_piece(images: tuple[Range, ...], call: AttentionCall) -> None:
    first, stop = call.passing.past, call.passing.past + call.passing.n
    for a, z in images:
        if a < first < z or a < stop < z:
            raise ValueError(
                f"ConcentricCausal: this pass holds columns {first} to {stop}, which cuts the image "
                f"({a}, {z}); its rings see each other, so read it in one pass"
            )
