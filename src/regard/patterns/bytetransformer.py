"""ByteTransformer: an encoder layer that computes no padding.

Zhai et al., "ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
arXiv 2210.03052. All token-wise steps run on the packed tokens, attention runs within each sequence
over its true length; the batch is unpadded once at the start and padded once at the end.

The authors' reference adds -10000 to the scores of padded keys and zeroes padded rows afterwards.
Here no padded key exists, so nothing leaks in half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.card import Card
from regard.core.varlen import attend_packed, pack, unpack

CARD = Card(
    key="bytetransformer",
    title="ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
    arxiv="2210.03052",
    family="kernel",
    entry="regard.patterns.bytetransformer:PackedEncoderLayer",
    definition="tests/patterns/test_bytetransformer.py::test_equals_the_equations_in_float64",
    oracle="python -m tests.golden tests/golden/data/bytetransformer.npz",
    claim="python -m benchmarks.bytetransformer",
    cost="python -m benchmarks.bytetransformer",
    note="Packing and per-sequence attention in PyTorch; the fused CUDA kernels are not copied.",
)


class PackedEncoderLayer(nn.Module):
    """A BERT encoder layer on packed tokens (figure 2 of the paper).

        h = LN(attention(x) W_o + b_o + x)
        y = LN(GELU(h W_1 + b_1) W_2 + b_2 + h)

    Post-norm, exact GELU.

    Args:
        dim: `C`.
        heads: number of heads; it divides `dim`.
        hidden: width of the feed-forward part, default `4 C`.
        dropout: probability on both residual branches.
        eps: of the layer norms.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int | None = None,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"PackedEncoderLayer: heads is {heads}, which does not divide dim's {dim}"
            )
        hidden = 4 * dim if hidden is None else hidden
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One layer on packed tokens; a stack of layers packs once.

        Args:
            x: `(T, C)`, as from :func:`regard.core.varlen.pack`.
            cu_seqlens: int `(B + 1,)`, cumulative lengths.

        Returns:
            `(T, C)`.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        mixed = attend_packed(q, k, v, cu_seqlens)
        assert isinstance(mixed, Tensor)
        h = self.norm1(self._drop(self.out(mixed.flatten(1))) + x)
        y: Tensor = self.norm2(self._drop(self.outer(F.gelu(self.inner(h)))) + h)
        return y

    def padded(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The layer on a padded batch `(B, S, C)`; padded rows of the result are exactly 0.

        Args:
            lengths: int `(B,)`, or a bool mask `(B, S)` of the tokens that count.
        """
        packed = pack(x, lengths)
        return unpack(self(packed.x, packed.cu_seqlens), packed.rows, x.shape[:2])

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    @classmethod
    @torch.no_grad()
    def from_torch(cls, layer: nn.TransformerEncoderLayer) -> PackedEncoderLayer:
        """A layer with copies of the weights of a post-norm GELU layer of PyTorch.

        Raises:
            ValueError: another activation, pre-norm, or no biases.
        """
        activation = layer.activation
        exact = activation is F.gelu or (
            isinstance(activation, nn.GELU) and activation.approximate == "none"
        )
        if layer.norm_first or not exact or layer.linear1.bias is None:
            raise ValueError(
                "PackedEncoderLayer: expected a TransformerEncoderLayer with norm_first=False, "
                'activation="gelu" and biases'
            )
        attention = layer.self_attn
        own = cls(
            attention.embed_dim,
            attention.num_heads,
            layer.linear1.out_features,
            dropout=layer.dropout1.p,
            eps=layer.norm1.eps,
        ).to(layer.linear1.weight)
        own.qkv.weight.copy_(attention.in_proj_weight)
        own.qkv.bias.copy_(attention.in_proj_bias)
        for mine, theirs in (
            (own.out, attention.out_proj),
            (own.norm1, layer.norm1),
            (own.inner, layer.linear1),
            (own.outer, layer.linear2),
            (own.norm2, layer.norm2),
        ):
            mine.load_state_dict(theirs.state_dict())
        return own.train(layer.training)
