"""An image transformer on :class:`regard.sparse.sparsifiner.SparsifinerAttention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sparsifiner import Reconstruction, SparsifinerAttention

__all__ = ["Output", "Sparsifiner", "SparsifinerBlock"]


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).mT
        return out


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class SparsifinerBlock(nn.Module):
    """`x + attention(LN(x))`, then `x + MLP(LN(x))` on `(B, N, C)`, under the authors' names.

    Args:
        attention: of the block.
        mlp_ratio: width of the MLP's hidden layer over `C`.
    """

    def __init__(self, attention: SparsifinerAttention, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        dim = attention.proj.out_features
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """`(B, N, C)` to the same, by the chosen keys; `active` bool `(B, N)` as the attention's."""
        x = x + self.attn(self.norm1(x), active)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def reconstruct(self, x: Tensor) -> Reconstruction:
        """The block with dense attention, and what its predictor learns from."""
        found = self.attn.reconstruct(self.norm1(x))
        x = x + found.out
        return found._replace(out=x + self.mlp(self.norm2(x)))


class Output(NamedTuple):
    """What the transformer gives for images.

    Attributes:
        logits: `(B, classes)`.
        tokens: all tokens but the class token, after the last normalisation, `(B, N - 1, C)`.
        scores, attentions: of every layer, see :class:`regard.sparse.sparsifiner.Reconstruction`;
            empty where attention was sparse.
    """

    logits: Tensor
    tokens: Tensor
    scores: list[Tensor]
    attentions: list[Tensor]


class Sparsifiner(nn.Module):
    """A vision transformer whose tokens attend to the tokens that predictors choose.

    Weights have the authors' names, those of DeiT plus `blocks.*.attn.mask_predictor`. A DeiT's weights
    load with `strict=False`; the losses of :mod:`regard.sparse.sparsifiner_train` then train
    :meth:`predictors` and :meth:`backbone` in turn.

    Args:
        image, patch: sides in pixels; `patch` divides `image`.
        dim, depth, heads: of the transformer; the defaults are DeiT-S.
        classes, channels: of the head and of the image.
        mlp_ratio: of the blocks.
        keep, reduce_n, basis_topk: as the attention's.
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        classes: int = 1000,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        *,
        keep: float = 0.25,
        reduce_n: int = 6,
        basis_topk: int | None = 8,
    ) -> None:
        super().__init__()
        if patch < 1 or image < patch or image % patch:
            raise ValueError(f"Sparsifiner: patch {patch} does not divide image {image}")
        tokens = (image // patch) ** 2 + 1
        self.image = image
        self.patch_embed = _PatchEmbed(channels, dim, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        options: dict[str, Any] = {"keep": keep, "reduce_n": reduce_n, "basis_topk": basis_topk}
        self.blocks = nn.ModuleList(
            SparsifinerBlock(SparsifinerAttention(dim, tokens, heads, **options), mlp_ratio)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images `(B, channels, image, image)` to tokens `(B, N, C)`, the class token first."""
        want = (self.patch_embed.proj.in_channels, self.image, self.image)
        if images.dim() != 4 or images.shape[1:] != want:
            raise ValueError(
                f"Sparsifiner: got images {tuple(images.shape)}, expected (batch, {want[0]}, "
                f"{want[1]}, {want[2]})"
            )
        x = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

    def forward(self, images: Tensor) -> Output:
        """Logits and tokens by sparse attention, as at inference and in the second phase of training."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self._read(x, [], [])

    def reconstruct(self, images: Tensor) -> Output:
        """The same with dense attention, and what the predictors learn from. Quadratic."""
        x, scores, attentions = self.embed(images), [], []
        for block in self._layers():
            x, score, attention = block.reconstruct(x)
            scores.append(score)
            attentions.append(attention)
        return self._read(x, scores, attentions)

    def _read(self, x: Tensor, scores: list[Tensor], attentions: list[Tensor]) -> Output:
        x = self.norm(x)
        return Output(self.head(x[:, 0]), x[:, 1:], scores, attentions)

    def _layers(self) -> list[SparsifinerBlock]:
        return [x for x in self.blocks if isinstance(x, SparsifinerBlock)]

    def predictors(self) -> Iterator[nn.Parameter]:
        """The parameters that reconstruction trains; all others are trained in the second phase."""
        for block in self._layers():
            yield from block.attn.mask_predictor.parameters()

    def backbone(self) -> Iterator[nn.Parameter]:
        """The parameters of the second phase."""
        return (x for name, x in self.named_parameters() if "mask_predictor" not in name)
