"""NAT and DiNAT: vision transformers on neighbourhood attention.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001; Hassani et al.,
"Neighborhood Attention Transformer", arXiv 2204.07143. DiNAT alternates windows of neighbours with
windows spread over the whole map by a dilation (section 3.1), at the same cost: `ℓ` layers with the
best dilations see `k^ℓ` positions instead of `ℓ (k - 1) + 1` (table 1).

The papers write `(q k^T + B) / sqrt(d)`; the authors' code adds `B` after scaling. Here too, so that
their weights fit: parameters have the official names. The heads of Large are those of the paper,
6, 12, 24, 48 (32 channels each); the constructor of the authors' repository has 4, 8, 16, 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from regard.card import Card

from .dinat_layers import DilatedNeighborhoodAttention as DilatedNeighborhoodAttention
from .dinat_layers import DiNATLayer as DiNATLayer

CARD = Card(
    key="dinat",
    title="Dilated Neighborhood Attention Transformer",
    arxiv="2209.15001",
    family="kernel",
    entry="regard.patterns.dinat:dinat",
    definition="tests/patterns/test_dinat.py::test_equals_loops_over_neighbours_in_float64",
    oracle="python -m tests.golden tests/golden/data/dinat.npz",
    claim="python -m benchmarks.dinat",
    cost="tests/patterns/test_dinat.py::test_cost_grows_linearly_and_not_with_the_dilation",
    note="The bias is added after scaling, as in the authors' code.",
)


class _Tokenizer(nn.Module):
    """Image `(B, 3, 4 X, 4 Y)` to `(B, X, Y, C)` by two convolutions that halve it."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(channels, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return found


class _Downsampler(nn.Module):
    """`(B, X, Y, C)` to `(B, X / 2, Y / 2, 2 C)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        smaller = self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        found: Tensor = self.norm(smaller)
        return found


class _Level(nn.Module):
    """Layers at one resolution, and the step to the next."""

    def __init__(self, layers: Sequence[DiNATLayer], dim: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.downsample = None if last else _Downsampler(dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


@dataclass(frozen=True)
class Variant:
    """A size of the family.

    Attributes:
        depths, heads: layers and heads of the levels.
        embed_dim: `C` of the first level; each next has twice as many.
        mlp_ratio, drop_path, layer_scale: of the layers; `drop_path` is reached at the last one.
        dilations: of every second layer, for each level; the others are not dilated.
    """

    depths: tuple[int, ...]
    embed_dim: int
    heads: tuple[int, ...]
    mlp_ratio: float
    drop_path: float
    layer_scale: float | None = None
    dilations: tuple[int, ...] = (8, 4, 2, 1)


_SMALL, _DEEP, _NAT = (3, 4, 6, 5), (3, 4, 18, 5), (1, 1, 1, 1)
VARIANTS = {
    "nat_mini": Variant(_SMALL, 64, (2, 4, 8, 16), 3, 0.2, dilations=_NAT),
    "nat_tiny": Variant(_DEEP, 64, (2, 4, 8, 16), 3, 0.2, dilations=_NAT),
    "nat_small": Variant(_DEEP, 96, (3, 6, 12, 24), 2, 0.3, 1e-5, _NAT),
    "nat_base": Variant(_DEEP, 128, (4, 8, 16, 32), 2, 0.5, 1e-5, _NAT),
    "dinat_mini": Variant(_SMALL, 64, (2, 4, 8, 16), 3, 0.2),
    "dinat_tiny": Variant(_DEEP, 64, (2, 4, 8, 16), 3, 0.2),
    "dinat_small": Variant(_DEEP, 96, (3, 6, 12, 24), 2, 0.3),
    "dinat_base": Variant(_DEEP, 128, (4, 8, 16, 32), 2, 0.5),
    "dinat_large": Variant(_DEEP, 192, (6, 12, 24, 48), 2, 0.35),
    "dinat_large_384": Variant(_DEEP, 192, (6, 12, 24, 48), 2, 0.35, dilations=(13, 6, 3, 1)),
}


class DiNAT(nn.Module):
    """The classifier: tokenizer, levels, LN, mean over the map, linear head (section 3.3).

    Args:
        variant: sizes.
        classes: of the head.
        window: `k` of all layers.
        channels: of the image.

    Images must be at least `32 k` pixels high and wide, so that a window fits into the last level
    and `4 k δ` with the first level's dilation `δ`: 224 for the defaults.
    """

    def __init__(
        self, variant: Variant, classes: int = 1000, window: int = 7, channels: int = 3
    ) -> None:
        super().__init__()
        self.variant, self.window = variant, window
        self.patch_embed = _Tokenizer(channels, variant.embed_dim)
        total = sum(variant.depths)
        drops = [variant.drop_path * layer / max(1, total - 1) for layer in range(total)]
        levels = []
        for at, (depth, heads, dilation) in enumerate(
            zip(variant.depths, variant.heads, variant.dilations, strict=True)
        ):
            dim, before = variant.embed_dim << at, sum(variant.depths[:at])
            layers = [
                DiNATLayer(
                    dim,
                    heads,
                    window,
                    dilation if layer % 2 else 1,
                    variant.mlp_ratio,
                    drops[before + layer],
                    variant.layer_scale,
                )
                for layer in range(depth)
            ]
            levels.append(_Level(layers, dim, at == len(variant.depths) - 1))
        self.levels = nn.ModuleList(levels)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """Image `(B, 3, X, Y)` to the last level's mean, `(B, 8 C)`."""
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        found: Tensor = self.norm(x).mean((1, 2))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Image `(B, 3, X, Y)` to logits `(B, classes)`."""
        logits: Tensor = self.head(self.features(x))
        return logits


def dinat(variant: str = "dinat_mini", classes: int = 1000, window: int = 7) -> DiNAT:
    """A fresh NAT or DiNAT by its name, one of `VARIANTS`; parameters have the official names."""
    if variant not in VARIANTS:
        raise ValueError(f"dinat: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return DiNAT(VARIANTS[variant], classes, window)
