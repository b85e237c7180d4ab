"""Sparsifiner: a low-rank predictor of which tokens each token of an image should attend to.

Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers", arXiv 2303.13755. For every head, with queries and keys projected to `D / 2`, a
projection of the tokens `P` and a learned basis over the tokens `P_back`, both `(N, n')`, section 3.2:

    coefficients = softmax(H^(-1/2) Q_c (K_c^T P)),    scores = coefficients P_back^T

The best `keep N` scores of a row are the keys that it reads, the class token reads all (section 3.3).
There are two forms. At inference the basis is `|P_back|` without its entries up to 0.02, and a row
keeps 8 coefficients (or those above 0.05), so that the product is one of sparse matrices. While the
predictor learns, both are taken as they are, signed, and the scores are fitted to the rows of a
teacher's attention: see :mod:`regard.sparse.sparsifiner_train`. No gradient passes the choice.

`N` is fixed by `P`. Cost: `N n' D / 2` to predict and `2 keep N^2 D` to attend, against `2 N^2 D`.
Attention runs from the lists of chosen keys, one a row; the authors' code (lim142857/Sparsifiner)
computes all scores and masks them. The scale `H^(-1/2)` of the coefficients is theirs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.card import Card

from .sparsifiner_keys import choose_keys, connected_attend, sparse_basis, sparse_coefficients

__all__ = [
    "CARD",
    "ConnectivityPredictor",
    "Reconstruction",
    "SparsifinerAttention",
    "choose_keys",
    "connected_attend",
    "sparse_basis",
    "sparse_coefficients",
]

CARD = Card(
    key="sparsifiner",
    title=(
        "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers"
    ),
    arxiv="2303.13755",
    family="sparse",
    entry="regard.sparse.sparsifiner:SparsifinerAttention",
    definition="tests/sparse/test_sparsifiner.py::test_is_the_papers_rule_row_by_row",
    oracle="python -m tests.golden tests/golden/data/sparsifiner.npz",
    claim="python -m benchmarks.sparsifiner --train",
    cost="python -m benchmarks.sparsifiner --only growth",
    note="Lists of single keys save work, not time, at the lengths of image transformers on a CPU.",
)


class ConnectivityPredictor(nn.Module):
    """Predicts which keys matter to a query, from the low-rank form of the module's docstring.

    Weights have the authors' names: `proj_c_q`, `proj_c_k`, `proj_n` (`P`), `proj_back_n` (`P_back`).

    Args:
        dim, heads: channels of the layer and `H`, which divides `dim`; `D = dim / heads`.
        num_tokens: `N`, the class token counted.
        keep: share of the keys that a row reads, in (0, 1]: `ceil(keep N)` keys.
        reduce_n: `n' = floor(N / reduce_n)`.
        reduce_c: queries and keys are projected to `floor(D / reduce_c)` channels.
        basis_topk: coefficients of a row at inference (all where there are fewer); None for those
            above `coef_thr`.
        basis_thr: what an entry of the basis must exceed at inference.
        coef_thr: see `basis_topk`.
        score_thr: keys whose score is above it instead of the best `ceil(keep N)`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        num_tokens: int,
        keep: float = 0.25,
        reduce_n: int = 6,
        reduce_c: int = 2,
        basis_topk: int | None = 8,
        basis_thr: float = 0.02,
        *,
        coef_thr: float = 0.05,
        score_thr: float | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"ConnectivityPredictor: {heads} heads do not divide dim {dim}")
        if not 0 < keep <= 1:
            raise ValueError(f"ConnectivityPredictor: keep must lie in (0, 1], got {keep}")
        if not 1 <= reduce_n <= num_tokens or not 1 <= reduce_c <= dim // heads:
            raise ValueError(
                "ConnectivityPredictor: reduce_n must lie in [1, num_tokens] and reduce_c in "
                f"[1, dim / heads], got {reduce_n} of {num_tokens} and {reduce_c} of {dim // heads}"
            )
        if basis_topk is not None and basis_topk < 1:
            raise ValueError(f"ConnectivityPredictor: basis_topk must be >= 1, got {basis_topk}")
        self.heads, self.num_tokens, self.budget = heads, num_tokens, math.ceil(keep * num_tokens)
        self.basis_topk, self.basis_thr = basis_topk, basis_thr
        self.coef_thr, self.score_thr = coef_thr, score_thr
        dim_head, rank = dim // heads, num_tokens // reduce_n
        self.proj_c_q = nn.Linear(dim_head, dim_head // reduce_c)
        self.proj_c_k = nn.Linear(dim_head, dim_head // reduce_c)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, rank))
        self.proj_back_n = nn.Parameter(torch.empty(num_tokens, rank))
        for weight in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(weight, std=0.02)

    def coefficients(self, q: Tensor, k: Tensor, active: Tensor | None = None) -> Tensor:
        """Coefficients of the basis for all tokens but the first, `(B, H, N - 1, n')`.

        Args:
            q, k: `(B, H, N, D)` of the same tokens.
            active: bool `(B, N)`; pruned tokens do not enter the sums over tokens.
        """
        want = (q.shape[0], self.heads, self.num_tokens, self.proj_c_q.in_features)
        for name, x in (("q", q), ("k", k)):
            if x.shape != want:
                raise ValueError(
                    f"ConnectivityPredictor: {name} has shape {tuple(x.shape)}, expected {want}"
                )
        if active is not None and (active.dtype != torch.bool or active.shape != want[::2]):
            raise ValueError(
                f"ConnectivityPredictor: active must be bool {want[::2]}, got {active.dtype} "
                f"{tuple(active.shape)}"
            )
        low_q, low_k = self.proj_c_q(q[:, :, 1:]), self.proj_c_k(k)
        if active is not None:
            low_k = low_k.masked_fill(~active[:, None, :, None], 0.0)
        out: Tensor = ((low_q @ (low_k.mT @ self.proj_n)) * self.heads**-0.5).softmax(-1)
        return out

    def signed(self, q: Tensor, k: Tensor) -> Tensor:
        """The scores that are fitted to a teacher's attention, `(B, H, N - 1, N)`."""
        return self.coefficients(q, k) @ self.proj_back_n.mT

    def forward(self, q: Tensor, k: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scores of inference `(B, H, N - 1, N)`, and what each token reads, bool `(B, H, N, N)`."""
        found = self.coefficients(q, k, active)
        kept = sparse_coefficients(found, self.basis_topk, self.coef_thr)
        score = kept @ sparse_basis(self.proj_back_n, self.basis_thr).mT
        return score, choose_keys(score.detach(), self.budget, self.score_thr, active)


class Reconstruction(NamedTuple):
    """What a layer gives while its predictor learns.

    Attributes:
        out: of dense attention, `(B, N, C)`.
        score: signed scores `(B, H, N - 1, N)`.
        attention: weights of the dense attention `(B, H, N, N)`.
    """

    out: Tensor
    score: Tensor
    attention: Tensor


class SparsifinerAttention(nn.Module):
    """Attention of an image transformer to the tokens that a :class:`ConnectivityPredictor` names.

    On `(B, N, C)` with the class token first. Weights have the authors' names: `qkv`, `proj`,
    `mask_predictor`.

    Args:
        dim: `C`.
        num_tokens: `N`.
        heads: `H`, divides `dim`.
        qkv_bias: biases in the projections.
        keep, reduce_n, reduce_c, basis_topk, basis_thr, coef_thr, score_thr: as the predictor's.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        heads: int = 8,
        qkv_bias: bool = True,
        *,
        keep: float = 0.25,
        reduce_n: int = 6,
        reduce_c: int = 2,
        basis_topk: int | None = 8,
        basis_thr: float = 0.02,
        coef_thr: float = 0.05,
        score_thr: float | None = None,
    ) -> None:
        super().__init__()
        self.mask_predictor = ConnectivityPredictor(
            dim,
            heads,
            num_tokens,
            keep,
            reduce_n,
            reduce_c,
            basis_topk,
            basis_thr,
            coef_thr=coef_thr,
            score_thr=score_thr,
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `(B, N, C)`, each `(B, H, N, D)`."""
        want = self.mask_predictor.num_tokens, self.qkv.in_features
        if x.dim() != 3 or x.shape[1:] != want:
            raise ValueError(
                f"SparsifinerAttention: got input {tuple(x.shape)}, expected (batch, {want[0]}, "
                f"{want[1]})"
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.mask_predictor.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """`(B, N, C)` to the same, by the chosen keys.

        Args:
            active: bool `(B, N)`, tokens that are not pruned (default all).
        """
        q, k, v = self.heads_of(x)
        _, mask = self.mask_predictor(q, k, active)
        out: Tensor = self.proj(connected_attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return out

    def reconstruct(self, x: Tensor) -> Reconstruction:
        """Dense attention, its weights, and the scores that are to resemble them. Quadratic."""
        q, k, v = self.heads_of(x)
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return Reconstruction(out, self.mask_predictor.signed(q, k), attention)
