"""Bi-level routing attention: image regions choose regions, then tokens attend to their tokens.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810. The image
is cut into `S x S` regions. The mean query of a region against the mean keys of all regions, all
channels together, chooses `k` regions (eqs. 2 to 4); every token of the region then attends to every
token of those (eqs. 5 and 6):

    I = topk(Q_r K_r^T),    O_i = softmax(s Q_i [K_I1; ...; K_Ik]^T) [V_I1; ...; V_Ik]

The choice is the same for all heads and passes no gradient. Tokens are grouped by region with a
permuted :class:`regard.core.layout.BlockLayout` whose blocks are regions, so chosen keys are read where
they lie instead of being copied `k` times. Cost: `S^4 C` multiplications to route and
`2 N^2 (k / S^2) C` to attend; with the best `S`, which grows as `N^(1/3)`, together O(N^(4/3)).

As in the authors' code (rayleizhu/BiFormer, ops/bra_nchw.py) the score is scaled by the width of all
heads together, `s = C^(-1/2)`, and regions of a side that `S` does not divide are `floor(side / S)`
pixels, so that there are more than `S` of them, the last one smaller. There the authors' zero padding
takes part in the softmax; here it is no key, and the output differs from theirs for that reason.
"""

from __future__ import annotations

from torch import Tensor, nn

from regard.card import Card

from .biformer_regions import Side, region_attend, region_layout, route_regions
from .biformer_weights import rename_legacy

__all__ = [
    "CARD",
    "BiLevelRoutingAttention",
    "region_attend",
    "region_layout",
    "route_regions",
]

CARD = Card(
    key="biformer",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    arxiv="2303.08810",
    family="sparse",
    entry="regard.sparse.biformer:BiLevelRoutingAttention",
    definition="tests/sparse/test_biformer.py::test_is_the_equation_region_by_region",
    oracle="python -m tests.golden tests/golden/data/biformer.npz",
    claim="python -m benchmarks.biformer --train",
    cost="python -m benchmarks.biformer --only growth",
    note="Where S does not divide the sides, padding is masked; the authors let it into the softmax.",
)


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention with its projections and a depthwise convolution of the values.

    On `(B, C, Y, X)`. Weights have the names of the authors' `nchwBRA`: `qkv_linear`, `output_linear`,
    `lepe`. Those of their older module, which the published models were trained with (`qkv.qkv`, `wo`),
    load too.

    Args:
        dim: `C`.
        heads: divides `dim`.
        n_win: `S`; a region is `floor(Y / S)` by `floor(X / S)` pixels.
        topk: `k`, regions that a region reads.
        side_dwconv: side of the convolution, odd; 0 for none. The paper's models take 5.
        scale: `s`, default `dim ** -0.5`, as the paper's models were trained.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        side_dwconv: int = 3,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"BiLevelRoutingAttention: {heads} heads do not divide dim {dim}")
        if n_win < 1 or topk < 1:
            raise ValueError(
                f"BiLevelRoutingAttention: n_win and topk must be >= 1, got {n_win} and {topk}"
            )
        if side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
            raise ValueError(
                f"BiLevelRoutingAttention: side_dwconv must be odd, or 0 for none, got {side_dwconv}"
            )
        self.heads, self.n_win, self.topk = heads, n_win, topk
        self.scale = dim**-0.5 if scale is None else scale
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)
        self.lepe: nn.Module | None = None
        if side_dwconv:
            self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)
        self.register_load_state_dict_pre_hook(rename_legacy)

    def region_size(self, x: Tensor) -> Side:
        """Rows and columns of a region of an image `(B, C, Y, X)`."""
        if x.dim() != 4 or x.shape[1] != self.qkv_linear.in_channels:
            raise ValueError(
                f"BiLevelRoutingAttention: got input {tuple(x.shape)}, expected "
                f"(batch, {self.qkv_linear.in_channels}, rows, columns)"
            )
        if min(x.shape[2:]) < self.n_win:
            raise ValueError(
                f"BiLevelRoutingAttention: an image of {x.shape[2]} x {x.shape[3]} is smaller than "
                f"n_win = {self.n_win}"
            )
        return x.shape[2] // self.n_win, x.shape[3] // self.n_win

    def route(self, q: Tensor, k: Tensor, region_size: Side) -> Tensor:
        """The choice, `(B, R, topk)`, from queries and keys `(B, H, Y, X, D)`."""
        return route_regions(q, k, region_size, self.topk)

    def regions(self, x: Tensor) -> Tensor:
        """The regions that each region of an image `(B, C, Y, X)` reads, `(B, R, topk)`, ascending."""
        size = self.region_size(x)
        q, k, _ = self._project(x)
        return self.route(q, k, size)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `(B, H, Y, X, D)`."""
        qkv = self.qkv_linear(x).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.movedim(3, -1).unbind(1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, Y, X)` to the same."""
        size = self.region_size(x)
        q, k, v = self._project(x)
        out = region_attend(q, k, v, self.route(q, k, size), size, scale=self.scale)
        out = out.movedim(-1, 2).flatten(1, 2)
        if self.lepe is not None:
            out = out + self.lepe(v.movedim(-1, 2).flatten(1, 2))
        y: Tensor = self.output_linear(out)
        return y
