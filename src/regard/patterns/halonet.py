"""HaloNet: blocks of queries that look at their block and a halo around it.

Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv
2103.12731. The image is cut into `b x b` blocks; all queries of a block share one window of
`(b + 2 h)^2` keys (section 2.2), so keys are read once a block instead of once a pixel. Scores get
relative position terms that depend on the query (eq. 1):

    τ q·k + q·R_h[dy + w - 1] + q·R_w[dx + w - 1],    w = b + 2 h

where `dy` counts from the query's row in its block to the key's row in the window. Inside one window
the keys' rows modulo `w` all differ, so these terms are exactly of rank `2 w`: they go into
:func:`regard.attend` as a :class:`regard.LowRankBias`, and no `(pixels, window)` tensor is made.

Where timm's `HaloAttn` and a clean definition disagree, `mask_padding` chooses: timm lets the zeros
outside the image take part in the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.card import Card
from regard.core.attend import attend
from regard.core.bias import LowRankBias

from .halonet_mask import Halo

__all__ = ["CARD", "Halo", "HaloAttention", "HaloBlock", "halo_attention"]

CARD = Card(
    key="halonet",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    arxiv="2103.12731",
    family="kernel",
    entry="regard.patterns.halonet:HaloAttention",
    definition="tests/patterns/test_halonet.py::test_equals_the_loop_over_pixels",
    oracle="python -m tests.golden tests/golden/data/halonet.npz",
    claim="python -m benchmarks.halonet --only storage",
    cost="python -m benchmarks.halonet --only growth",
    note="mask_padding=False is timm's HaloAttn, which lets padding dilute the softmax at borders.",
)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    halo: int,
    bias: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float | None = None,
    scale_pos: bool = False,
    mask_padding: bool = True,
) -> Tensor:
    """Blocked local attention on a grid (arXiv 2103.12731, section 2.2).

    Args:
        q: `(B, H, Y / s, X / s, D)`; the stride `s` is 1, or 2 for queries on every other pixel.
        k, v: `(B, Hkv, Y, X, D)` and `(B, Hkv, Y, X, Dv)`.
        block: `b`, side of a block in pixels of `k`; divides `Y` and `X`, and `s` divides it.
        halo: `h`, pixels around a block that its queries see too.
        bias: `(R_h, R_w)`, each `(2 (b + 2 h) - 1, D)`, eq. 1 (default none). With stride 2 the
            query's offset in its block counts queries, not pixels, as in timm.
        scale: `τ`, default `D ** -0.5`.
        scale_pos: multiply the position terms by `τ` too.
        mask_padding: pixels outside the image are no keys. False lets them take part with their
            position terms alone and the value 0, as timm does.

    Returns:
        `(B, H, Y / s, X / s, Dv)`.

    Raises:
        ValueError: sides that `block` does not divide, grids or tables that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 5:
            raise ValueError(
                f"halo_attention: {name} must be (batch, heads, rows, columns, width), got "
                f"{tuple(x.shape)}"
            )
    if k.shape[2:4] != v.shape[2:4]:
        raise ValueError(
            f"halo_attention: v is on a grid {tuple(v.shape[2:4])}, k on {tuple(k.shape[2:4])}"
        )
    height, width = k.shape[2:4]
    stride = height // max(1, q.shape[2])
    if stride < 1 or (q.shape[2] * stride, q.shape[3] * stride) != (height, width):
        raise ValueError(
            f"halo_attention: q is on a grid {tuple(q.shape[2:4])}, expected k's "
            f"{(height, width)} or half of it"
        )
    mask = Halo((height, width), block, halo, stride, padded=not mask_padding)
    if not mask_padding:
        k, v = (F.pad(x, [0, 0, halo, halo, halo, halo]) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    terms = None
    if bias is not None:
        phi_q, phi_k = _position_factors(q, mask, *bias)
        terms = LowRankBias((phi_q * scale if scale_pos else phi_q).flatten(2, 3), phi_k)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    if q.device.type == "cpu":
        # One query block a block of the image, against exactly the keys of its window.
        layout = mask.layout(mask.queries, mask.keys, mask.exact_blocks, device=q.device)
        out = attend(*flat, layout=layout, bias=terms, scale=scale)
    else:
        out = attend(*flat, mask=mask, bias=terms, scale=scale)
    return out.unflatten(2, q.shape[2:4])


def _position_factors(q: Tensor, mask: Halo, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """`Φ_q` `(B, H, Y', X', 2 w)` and `Φ_k` `(M, 2 w)` of the position terms.

    Channel `c` of an axis stands for the keys whose coordinate is `c` modulo `w`: in each window
    there is exactly one such row, and one such column.
    """
    window, parts, marks = mask.window, [], []
    for axis, (table, spell) in enumerate(
        zip((rel_h, rel_w), ("bhyxd,ycd->bhyxc", "bhyxd,xcd->bhyxc"), strict=True)
    ):
        want = (2 * window - 1, q.shape[-1])
        if tuple(table.shape) != want:
            raise ValueError(
                f"halo_attention: bias[{axis}] has shape {tuple(table.shape)}, expected {want} for "
                f"block {mask.block}, halo {mask.halo} and heads of width {q.shape[-1]}"
            )
        side = mask.block // mask.stride
        at = torch.arange(q.shape[2 + axis], device=q.device)[:, None]
        start = at // side * mask.block - mask.reach
        offset = (torch.arange(window, device=q.device) - start) % window - at % side
        parts.append(torch.einsum(spell, q, table[offset + window - 1].to(q.dtype)))
        key = torch.arange(mask.keys, device=q.device)
        columns = mask.key_grid[1]
        key = key // columns if axis == 0 else key % columns
        marks.append(F.one_hot(key % window, window))
    return torch.cat(parts, -1), torch.cat(marks, -1).to(q.dtype)


class _Positions(nn.Module):
    """The relative tables `R_h`, `R_w` under timm's names."""

    def __init__(self, window: int, dim_head: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head))


class HaloAttention(nn.Module):
    """Halo attention with its projections, on `(B, C, Y, X)`; timm's names and shapes of weights.

    Args:
        dim, dim_out: channels in and out; `dim_out` defaults to `dim`.
        heads: `H`, divides `dim_out`.
        dim_head: width of queries and keys, default `dim_out * qk_ratio / H` with the numerator
            rounded to a multiple of 8, as timm does.
        block, halo: the paper's `b` and `h`.
        stride: 2 halves the grid, by queries on every other pixel.
        qkv_bias: biases in the projections.
        mask_padding: False for timm's treatment of borders, see :func:`halo_attention`.
        scale_pos: scale the position terms as well.
        qk_ratio: see `dim_head`.
        avg_down: with stride 2, attend at full resolution and average 2 x 2 afterwards. An odd
            `block` does so in any case.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        heads: int = 8,
        dim_head: int | None = None,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        qkv_bias: bool = False,
        mask_padding: bool = True,
        scale_pos: bool = False,
        *,
        qk_ratio: float = 1.0,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if heads < 1 or dim_out % heads:
            raise ValueError(f"HaloAttention: {heads} heads do not divide dim_out {dim_out}")
        if stride not in (1, 2):
            raise ValueError(f"HaloAttention: stride must be 1 or 2, got {stride}")
        self.heads, self.block, self.halo = heads, block, halo
        self.mask_padding, self.scale_pos = mask_padding, scale_pos
        self.dim_head = dim_head or _divisible(dim_out * qk_ratio) // heads
        self.pooled = stride == 2 and (avg_down or block % 2 == 1)
        window = Halo((block, block), block, halo).window
        wide = heads * self.dim_head
        step = 1 if self.pooled else stride
        self.q = nn.Conv2d(dim, wide, 1, stride=step, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, wide + dim_out, 1, bias=qkv_bias)
        self.pos_embed = _Positions(window, self.dim_head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal: deviation `dim ** -0.5` in projections, `dim_head ** -0.5` in tables."""
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.weight.shape[1] ** -0.5)
        for table in self.pos_embed.parameters():
            nn.init.trunc_normal_(table, std=self.dim_head**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, Y, X)` to `(B, dim_out, Y / stride, X / stride)`."""
        if x.dim() != 4 or x.shape[1] != self.q.in_channels:
            raise ValueError(
                f"HaloAttention: got input {tuple(x.shape)}, expected "
                f"(batch, {self.q.in_channels}, rows, columns)"
            )
        # Checked before the strided convolution, which would round the grid silently.
        Halo((x.shape[2], x.shape[3]), self.block, self.halo)
        q, kv = (
            conv(x).unflatten(1, (self.heads, -1)).permute(0, 1, 3, 4, 2)
            for conv in (self.q, self.kv)
        )
        k, v = kv.split([self.dim_head, kv.shape[-1] - self.dim_head], dim=-1)
        out = halo_attention(
            q,
            k,
            v,
            self.block,
            self.halo,
            (self.pos_embed.height_rel, self.pos_embed.width_rel),
            scale_pos=self.scale_pos,
            mask_padding=self.mask_padding,
        )
        out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)
        return F.avg_pool2d(out, 2) if self.pooled else out


def _divisible(value: float, by: int = 8) -> int:
    """The nearest multiple of `by`, but not less than 0.9 of `value` and at least `by`."""
    found = max(by, int(value + by / 2) // by * by)
    return found + by if found < 0.9 * value else found


class _ConvNorm(nn.Module):
    """A 1 x 1 convolution and its normalisation, under timm's names."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class HaloBlock(nn.Module):
    """HaloNet's bottleneck (section 2.3): 1 x 1 convolution, halo attention, 1 x 1 convolution,
    and a shortcut. Weights have the names of timm's `SelfAttnBlock`.

    Args:
        dim, dim_out: channels in and out.
        attention: a :class:`HaloAttention` of `C -> C` for the bottleneck's `C` channels.
        stride: that of `attention`. With stride 2, or another `dim_out`, the shortcut is a 2 x 2
            average and a 1 x 1 convolution; else the input itself.
        act: the activation, applied after both convolutions and after attention.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        attention: HaloAttention,
        stride: int = 1,
        act: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        inner = attention.kv.in_channels
        found = 2 if attention.pooled else attention.q.stride[0]
        if found != stride:
            raise ValueError(f"HaloBlock: stride is {stride}, but attention has stride {found}")
        self.conv1_1x1 = _ConvNorm(dim, inner)
        self.self_attn = attention
        self.post_attn = nn.BatchNorm2d(attention.kv.out_channels - attention.q.out_channels)
        self.conv3_1x1 = _ConvNorm(self.post_attn.num_features, dim_out)
        self.shortcut: nn.Module | None = None
        if stride == 2 or dim != dim_out:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module("pool", nn.AvgPool2d(stride) if stride > 1 else nn.Identity())
            self.shortcut.add_module("conv", _ConvNorm(dim, dim_out))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, Y, X)` to `(B, dim_out, Y / stride, X / stride)`."""
        y = self.act(self.post_attn(self.self_attn(self.act(self.conv1_1x1(x)))))
        beside = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = self.act(self.conv3_1x1(y) + beside)
        return out
