"""CLEAR's attention layer for joint image-text transformers: see :mod:`regard.patterns.clear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .clear import ClearPool, clear_attention, proportional_scale


class ClearAttention(nn.Module):
    """Joint attention of text and image tokens within circles: a drop-in for FLUX's layers.

    Weights have the names of FLUX's attention in diffusers, and the pooling weight that of the
    authors' processor, so both load: `to_q, to_k, to_v, norm_q, norm_k`, with `joint` also
    `add_q_proj, add_k_proj, add_v_proj, norm_added_q, norm_added_k, to_out.0, to_add_out`, and with
    `pool` `processor.spatial_weight`.

    Args:
        dim: channels `C` of image and text.
        heads: `H`, divides `dim`.
        radius: `r`; None attends everywhere, as the teacher does.
        grid: `(h, w)` of images, unless a call says otherwise.
        text: `T` of sequences that come as one (single-stream blocks), unless a call says otherwise.
        joint: text comes as its own sequence with its own projections (double-stream blocks). Only
            then is the output projected: FLUX's single-stream blocks do so themselves.
        pool: factor `f` of pooled tokens, default none (the paper also uses 4).
        qk_norm: RMS normalisation of queries and keys, eps 1e-6.
        proportional: scale scores by :func:`proportional_scale`, for resolutions not trained on.
        bias: biases in the projections.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        radius: float | None = 16,
        *,
        grid: tuple[int, int] | None = None,
        text: int = 512,
        joint: bool = False,
        pool: int | None = None,
        qk_norm: bool = True,
        proportional: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"ClearAttention: {heads} heads do not divide dim {dim}")
        self.heads, self.radius, self.grid, self.text = heads, radius, grid, text
        self.joint, self.proportional = joint, proportional

        def norm() -> nn.Module:
            return nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = norm(), norm()
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                nn.Linear(dim, dim, bias=bias) for _ in range(3)
            )
            self.norm_added_q, self.norm_added_k = norm(), norm()
            # The second entry stands for diffusers' dropout of probability 0.
            self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=bias), nn.Identity()])
            self.to_add_out = nn.Linear(dim, dim, bias=bias)
        self.processor = None if pool is None else ClearPool(pool)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *,
        grid: tuple[int, int] | None = None,
        text: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; the first three arguments are those of FLUX's layers.

        Args:
            hidden_states: `(B, h w, C)`, or `(B, T + h w, C)` without `encoder_hidden_states`.
            encoder_hidden_states: text `(B, T, C)`; given if and only if the layer is `joint`.
            image_rotary_emb: `(cos, sin)`, each `(T + h w, C / H)`; channels turn in neighbouring
                pairs.
            grid, text: replace the layer's.

        Returns:
            `(image, text)`, both projected, for a joint layer; else `(B, T + h w, C)`.
        """
        if (encoder_hidden_states is not None) != self.joint:
            raise ValueError(
                f"ClearAttention: encoder_hidden_states came {'not ' * self.joint}along, but the "
                f"layer is {'' if self.joint else 'not '}joint"
            )
        grid = self.grid if grid is None else grid
        if grid is None:
            raise ValueError("ClearAttention: no grid, give it to the layer or to the call")
        text = self.text if text is None else text
        q, k, v = (self._split(f(hidden_states)) for f in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            tq, tk, tv = (self._split(f(encoder_hidden_states)) for f in added)
            q = torch.cat([self.norm_added_q(tq), q], dim=2)
            k = torch.cat([self.norm_added_k(tk), k], dim=2)
            v = torch.cat([tv, v], dim=2)
        if image_rotary_emb is not None:
            q, k = (_rotate(x, *image_rotary_emb) for x in (q, k))
        scale = None
        if self.proportional:
            pooled = self.processor is not None
            scale = proportional_scale(k.shape[2], q.shape[3], pooled=pooled)
        out = clear_attention(
            q,
            k,
            v,
            grid=grid,
            radius=self.radius,
            text=text,
            pool=self.processor,
            scale=scale,
        )
        out = out.transpose(1, 2).flatten(2)
        if not self.joint:
            return out
        return self.to_out[0](out[:, text:]), self.to_add_out(out[:, :text])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs of channels, computed in float32 at least."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) * cos + turned.to(dtype) * sin).to(x.dtype)
