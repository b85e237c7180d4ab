"""VAR: weight of attention sinks is given to the image tokens, in heads that look at the image.

"See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321. Sink tokens
are those with a massive activation in the dimensions that the model's sinks use; image tokens among
them draw weight without meaning. In image-centric heads, rows after the image take a share of the
weight from all sinks and spread it over the other image tokens.

Followed: seilk/VisAttnSink, ``src/logic/logic.py``: sinks are found in the prompt only, and a layer
without a sink inside the image is left alone, even if it has sinks in the text
(``without="nothing"``; ``"text"`` takes the text's weight there too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from regard.card import Card

from ..models import saved
from ..models.calls import Pass
from ..models.edit import After, Edit, Layers, Site
from ..models.method import Calibrated
from ..models.moves import move
from ..models.spans import Spans

CARD = Card(
    key="var",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    arxiv="2503.03321",
    family="steer",
    entry="regard.steer.var:VAR",
    definition="tests/steer/test_var.py::test_is_the_loop_written_out",
    oracle="python -m tests.golden tests/golden/data/var.npz",
    claim="python -m benchmarks.var --smollm2",
    cost="python -m benchmarks.var --only growth",
    note="SmolLM2 answers about a paragraph that plays the image; its massive dimension is 507.",
)

Without: TypeAlias = Literal["nothing", "text"]
_EPS = 1e-6


def massive_tokens(hidden: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """Tokens with a massive activation (eq. 3): ``max_d |h_d| / rms(h) > tau`` over ``dims``.

    Args:
        hidden: input of a layer ``(..., N, C)``.
        dims: the model's massive dimensions; see :func:`~regard.steer.var_dims.find_massive_dims`.
        tau: at most ``sqrt(C)`` can be reached at all.

    Returns:
        bool ``(..., N)``.
    """
    dims = list(dims)
    if not dims or min(dims) < 0 or max(dims) >= hidden.shape[-1]:
        raise ValueError(
            f"massive_tokens: dims must lie in [0, {hidden.shape[-1]}), got {dims or 'none'}"
        )
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    return (wide[..., dims].abs() * scale).amax(-1) > tau


def image_centric(
    weights: Tensor, image: Tensor, sinks: Tensor, rho: float = 0.5, min_sum: float = 0.2
) -> Tensor:
    """Rows that look at the image, and not at its sinks only (section 5.1).

    Args:
        weights: ``(..., M)``.
        image, sinks: bool, broadcast to ``weights``.
        rho: the image's sinks hold at most this share of the weight on the image.
        min_sum: the image holds at least this weight.

    Returns:
        bool ``(...)``.
    """
    on_image = torch.where(image, weights, 0.0).sum(-1)
    on_sinks = torch.where(image & sinks, weights, 0.0).sum(-1)
    count = image.expand(weights.shape).sum(-1)
    return (on_sinks / (on_image + _EPS * count) <= rho) & (on_image >= min_sum)


def var_redistribute(
    weights: Tensor,
    image: Tensor,
    sinks: Tensor,
    rho: float = 0.5,
    min_sum: float = 0.2,
    p: float = 0.6,
    rows: Tensor | None = None,
    without: Without = "nothing",
) -> Tensor:
    """Redistributed weights (eqs. 6 to 8): chosen rows keep ``p`` of each sink's weight.

    Args:
        weights: ``(..., R, M)`` after the softmax.
        image, sinks: bool ``(M,)`` or broadcasting to ``weights``.
        rho, min_sum: see :func:`image_centric`.
        p: what sinks keep, in [0, 1]; 1 changes nothing. What they lose, sinks of the text (the first
            token among them) as well as of the image, goes to the image's other tokens in proportion.
        rows: bool, broadcasts to ``(..., R)``: rows that may change; default all.
        without: what happens where no sink lies inside the image: ``"nothing"``, or the ``"text"``
            sinks are redistributed all the same.

    Returns:
        As ``weights``; rows still sum to 1.

    Raises:
        ValueError: an unknown ``without``, or ``p`` outside [0, 1].
    """
    _check(p, without)
    chosen = image_centric(weights, image, sinks, rho, min_sum)
    if without == "nothing":
        chosen = chosen & (image & sinks).any(-1)
    if rows is not None:
        chosen = chosen & rows
    return move(weights, sinks & chosen[..., None], image & ~sinks, keep=p)


def _check(p: float, without: str) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"var: p must lie in [0, 1], got {p}")
    if without not in get_args(Without):
        raise ValueError(f"var: without must be one of {get_args(Without)}, got {without!r}")


@dataclass(frozen=True)
class VAR(Calibrated):
    """Visual attention redistribution in a running model.

        with regard.patch(model, VAR(dims=[2533, 1415]), spans=Spans.of(image=(35, 611))):
            model.generate(**inputs)

    It edits the weights of every row after the image, generated ones included; earlier rows, and so
    the keys and values of the image, stay as they are in the first edited layer. Sinks are found in
    each layer's input while the prompt is read. A prompt read in pieces has the sinks read so far.

    Attributes:
        dims: the model's massive dimensions, such as (2533, 1415) for Llama-2-7B and (2100, 4743) for
            13B; see :func:`~regard.steer.var_dims.find_massive_dims`.
        tau: threshold of :func:`massive_tokens`; default the paper's 20, or ``.8 sqrt(C)`` where a
            model of width ``C`` is too narrow for 20.
        rho, min_sum, p, without: as for :func:`var_redistribute`.
        layers: default all from layer 2 on; layer 0 has no layer before it and cannot be edited.
        image: name of the image's span.

    Raises:
        ValueError: a knob is out of range; while running: no such span, or the patch was entered when
            the prompt had already been read.
    """

    dims: Sequence[int]
    tau: float | None = None
    rho: float = 0.5
    min_sum: float = 0.2
    p: float = 0.6
    without: Without = "nothing"
    layers: Sequence[int] | None = None
    image: str = "image"

    def __post_init__(self) -> None:
        _check(self.p, self.without)
        object.__setattr__(self, "dims", tuple(int(d) for d in self.dims))
        if not self.dims:
            raise ValueError("VAR: dims is empty; find_massive_dims finds them")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(at) for at in self.layers))
            if min(self.layers, default=1) < 1:
                raise ValueError(f"VAR: layers must be >= 1, got {list(self.layers)}")

    def edits(self) -> Sequence[Edit]:
        """A reader of the layers' inputs, and an edit of the weights of rows after the image."""
        layers: Layers = _from_the_third if self.layers is None else self.layers
        before: Layers = _before_it if self.layers is None else [at - 1 for at in self.layers]
        return [
            Edit("resid", self._find, layers=before, rows=_of_prompt, observes=True),
            Edit("weights", self._redistribute, layers=layers, rows=After(self.image)),
        ]

    def save(self, path: str | Path) -> None:
        """Write the dimensions (safetensors) and the knobs (JSON in its header)."""
        knobs = {name: getattr(self, name) for name in _KNOBS}
        dims = torch.tensor(self.dims, dtype=torch.int64)
        saved.write(path, "var", {"dims": dims}, knobs, self.made_for)

    @classmethod
    def load(cls, path: str | Path) -> VAR:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another file.
        """
        tensors, knobs = saved.read(path, "var", "VAR")
        made_for = saved.model_of(path, "VAR")
        return cls(tuple(tensors["dims"].tolist()), made_for=made_for, **knobs)

    def _find(self, hidden: Tensor, site: Site) -> Tensor:
        """Sinks among the prompt's tokens, bool ``(B, columns so far)``, for the next layer."""
        new = massive_tokens(hidden, self.dims, default_tau(hidden.shape[-1], self.tau))
        known = site.cache_store.get(("sinks", site.layer + 1))
        if known is None:
            known = new.new_zeros(new.shape[0], int(site.rows[0]))
        known = known[:, : int(site.rows[0])]
        site.cache_store["sinks", site.layer + 1] = torch.cat([known, new], 1)
        return hidden

    def _redistribute(self, weights: Tensor, site: Site) -> Tensor:
        call = site.call
        assert call is not None and site.spans is not None
        found = site.cache_store.get(("sinks", site.layer))
        if found is None:
            raise ValueError(
                f"VAR: the sinks of layer {site.layer} are not known; enter the patch before the "
                "prompt is read, and without leaving out the layer before"
            )
        first, stop = call.own.offset, call.own.offset + call.m
        sinks = torch.nn.functional.pad(found, (0, max(stop - found.shape[1], 0)))[:, first:stop]
        key = first, stop
        if key not in site.store:  # the same in all layers
            site.store[key] = site.spans.contains(self.image, call.columns)
        image = site.store[key]
        return var_redistribute(
            weights,
            image,
            sinks[:, None, None],
            self.rho,
            self.min_sum,
            self.p,
            without=self.without,
        )


_KNOBS = ("tau", "rho", "min_sum", "p", "without", "layers", "image")


def default_tau(width: int, tau: float | None) -> float:
    """``tau``, or by default the paper's 20, below what a model of this width can reach at most."""
    return min(20.0, 0.8 * width**0.5) if tau is None else tau


def _of_prompt(rows: Tensor, passing: Pass, spans: Spans | None) -> Tensor:
    """Rows of the prompt, however many passes it is read in."""
    stop = passing.prompt if spans is None or spans.length is None else spans.length
    return rows < stop


def _from_the_third(depth: int) -> range:
    return range(2, depth)


def _before_it(depth: int) -> range:
    return range(1, depth - 1)
