"""InLine: linear attention that is injective, by normalising with a subtraction.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", arXiv 2412.06590. Dividing
by the sum of the scores makes linear attention blind to the length of a query: with ReLU, `q` and `3 q`
get the same weights. InLine subtracts the mean instead (Eq. 5), with `s = D^{-1/2} / M` for M keys:

    w_ij = s φ(q_i).φ(k_j) - mean_j' s φ(q_i).φ(k_j') + 1 / M

Rows sum to 1 and may be negative. In linear time, from the sums over keys of `k v^T`, `k`, `v` and 1:

    o_i = s φ(q_i)^T Σ φ(k_j) v_j^T + (1 - D^{-1/2} φ(q_i).mean φ(k)) mean v

The causal form here takes the sums over the tokens so far; it is an extension of the paper's, which is
for images. The four sums are one matrix `Σ [φ(k); 1] [v; 1]^T`, which is also its state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.card import Card
from regard.core.call import compute_dtype
from regard.core.recur import recur

from .grid_tokens import check_grid_tokens
from .local_mix import local_mix

CARD = Card(
    key="inline",
    title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    arxiv="2412.06590",
    family="linear",
    entry="regard.linear.inline:inline_attention",
    definition="tests/linear/test_inline.py::test_is_the_matrix_of_its_weights",
    oracle="python -m tests.golden tests/golden/data/inline.npz",
    claim="python -m benchmarks.inline --only injective",
    cost="python -m benchmarks.inline --only growth",
    note="The causal form, regard.linear.inline_causal:CausalInLineAttention, is an extension.",
)

FEATURES = ("identity", "relu", "leakyrelu", "exp")


def feature_map(x: Tensor, phi: str) -> Tensor:
    """`φ`, elementwise: `identity`, `relu`, `leakyrelu` (slope 0.01) or `exp` (of `x / 5`)."""
    if phi == "identity":
        return x
    if phi == "relu":
        return x.relu()
    if phi == "leakyrelu":
        return F.leaky_relu(x)
    if phi == "exp":
        return (0.2 * x).exp()
    raise ValueError(f"inline_attention: phi must be one of {', '.join(FEATURES)}, got {phi!r}")


def inline_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: str = "identity",
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> Any:
    """Injective linear attention over all keys (arXiv 2412.06590, Eq. 5), or over those so far.

    Args:
        q: `(B, H, N, D)`, before the feature map.
        k: `(B, Hkv, M, D)`, likewise; `Hkv` divides `H`.
        v: `(B, Hkv, M, Dv)`.
        phi: the feature map, see :func:`feature_map`.
        scale: on the scores, default `D ** -0.5`; it does not hold the `1 / M`.
        mask: `(B, M)` bool, True for keys; the others enter no sum and are not counted.
        causal: sums over the tokens up to each query's own, for `N = M` (not in the paper).
        state: of the tokens before, `(B, Hkv, D + 1, Dv + 1)`; causal only.
        return_state: also return the state; causal only.
        chunk, backend: of the causal form, as for :func:`regard.core.recur.recur`.

    Returns:
        `(B, H, N, Dv)` in the dtype of `q`, zeros where there are no keys; with `return_state` also
        the state, float32 (float64 for float64 input).

    Raises:
        ValueError: an argument does not fit.
    """
    _check(q, k, v, mask)
    if not causal and (state is not None or return_state):
        raise ValueError("inline_attention: a state needs causal=True")
    dtype, scale = compute_dtype(q.dtype), q.shape[3] ** -0.5 if scale is None else scale
    f_q, f_k = (feature_map(x.to(dtype), phi) for x in (q, k))
    # One more channel: `[φ(k); 1]`, `[v; 1]`, and a query that does not read the sum of the values.
    f_q, f_k, value = F.pad(f_q, (0, 1)), F.pad(f_k, (0, 1), value=1), v.to(dtype)
    value = F.pad(value, (0, 1), value=1)
    if mask is not None:
        f_k, value = (x.masked_fill(~mask[:, None, :, None], 0) for x in (f_k, value))
    group = q.shape[1] // k.shape[1]
    sums = None
    if causal:
        read, sums = recur(
            f_q, f_k, value, state=state, chunk=chunk, return_state=True, backend=backend
        )
        total = value.cumsum(2)
        if state is not None:
            total = total + state[:, :, -1:].to(dtype)
    else:
        memory = f_k.mT @ value
        read = f_q @ memory.repeat_interleave(group, dim=1)
        total = memory[:, :, -1:]
    total = total.repeat_interleave(group, dim=1)
    (summed, affinity), (values, count) = (x.split([v.shape[3], 1], dim=-1) for x in (read, total))
    count = count.clamp(min=1)
    mean = values / count
    out = (scale / count * (summed - affinity * mean) + mean).to(q.dtype)
    return (out, sums) if return_state else out


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raise ``ValueError`` unless the arguments of :func:`inline_attention` fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"inline_attention: {name} must be floating point (batch, heads, length, width), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    (b, h, _, d), (bk, hkv, m, dk) = q.shape, k.shape
    if bk != b or dk != d or hkv == 0 or h % hkv:
        raise ValueError(
            f"inline_attention: k must be ({b}, a divisor of {h}, keys, {d}), got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"inline_attention: v must be {tuple(k.shape[:3])} and its width, got {tuple(v.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (b, m)):
        raise ValueError(
            f"inline_attention: mask must be bool {(b, m)}, got {mask.dtype} {tuple(mask.shape)}"
        )


class InLineAttention(nn.Module):
    """The layer for images, with a local branch whose filters come from the image's mean token.

    Each channel of the values is convolved over the grid with a 3 x 3 filter of its own, which two
    linear maps within heads predict from the mean token. Parameters have the names of
    LeapLabTHU/InLine.

    Args:
        dim: channels `C`.
        heads: `H`, divides `dim`.
        grid: `(h, w)`, or one number for both.
        num_prefix: leading class tokens: they attend and count in means, the convolution skips them.
        phi: the feature map, see :func:`feature_map`.
        qkv_bias: biases in the projection to queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: int | tuple[int, int],
        *,
        num_prefix: int = 0,
        phi: str = "identity",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"InLineAttention: heads must divide dim {dim}, got {heads}")
        if phi not in FEATURES:
            raise ValueError(
                f"InLineAttention: phi must be one of {', '.join(FEATURES)}, got {phi!r}"
            )
        self.heads, self.num_prefix, self.phi = heads, num_prefix, phi
        self.grid = (grid, grid) if isinstance(grid, int) else grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=heads),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=heads),
        )

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """`(B, num_prefix + h * w, C)` to the same.

        Args:
            x: tokens in row-major order behind the class tokens.
            grid: of these tokens, default the one that the layer was made with; no parameter
                depends on it.
        """
        grid = self.grid if grid is None else grid
        check_grid_tokens("InLineAttention", x, grid, self.proj.in_features, self.num_prefix)
        qkv = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv)
        out = inline_attention(q, k, v, self.phi).transpose(1, 2).flatten(2)
        filters = self.residual(x.mean(1)[:, :, None]).reshape(len(x), x.shape[2], 3, 3)
        local = local_mix(qkv[2], filters, grid, num_prefix=self.num_prefix)
        mixed: Tensor = self.proj(out + local)
        return mixed
