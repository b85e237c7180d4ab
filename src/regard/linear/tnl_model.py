"""TransNormerLLM as a language model, with a state that streams."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .tnl import SimpleRMSNorm, TNLBlock, TNLState

States = tuple[TNLState, ...]


class _Decoder(nn.Module):
    """Embedding, layers and final norm, under the names of the released checkpoints."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, glu_dim: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(
            TNLBlock(dim, heads, glu_dim, layer, layers) for layer in range(layers)
        )
        self.final_norm = SimpleRMSNorm()
        self.embed_scale = math.sqrt(dim)

    def forward(
        self, ids: Tensor, state: States | None, mask: Tensor | None
    ) -> tuple[Tensor, States]:
        x = self.embed_scale * self.embed_tokens(ids)
        states = []
        for at, layer in enumerate(self.layers):
            before = None if state is None else state[at]
            x, after = layer(x, before, mask=mask, return_state=True)
            states.append(after)
        return self.final_norm(x), tuple(states)


class TransNormerLLM(nn.Module):
    """A decoder-only language model of :class:`regard.linear.tnl.TNLBlock` (arXiv 2405.17381).

    Embeddings are multiplied by `sqrt(dim)`; the head is not tied to them. Parameters carry the names
    of the released checkpoints (`model.layers.0.token_mixer.qkvu_proj.weight`, ...).

    Args:
        vocab: tokens of the vocabulary.
        dim, heads: width and heads.
        layers: at least 2.
        glu_dim: channels inside the gated linear units, default `dim` as in the released code.
    """

    def __init__(
        self, vocab: int, dim: int, layers: int, heads: int, glu_dim: int | None = None
    ) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError(f"TransNormerLLM: layers must be >= 2, got {layers}")
        self.model = _Decoder(vocab, dim, layers, heads, dim if glu_dim is None else glu_dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        ids: Tensor,
        state: States | None = None,
        *,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Logits `(B, N, vocab)` of the tokens after `ids` `(B, N)`.

        Args:
            ids: integers `(B, N)`.
            state: one :class:`regard.linear.tnl.TNLState` a layer, of the tokens before.
            mask: `(B, N)` bool, True for tokens; padding is skipped.
            return_state: also return the states after the last token.

        Raises:
            ValueError: `ids` is not `(B, N)`, or `state` has another number of layers.
        """
        layers = len(self.model.layers)
        if ids.dim() != 2:
            raise ValueError(f"TransNormerLLM: ids must be (batch, length), got {tuple(ids.shape)}")
        if state is not None and len(state) != layers:
            raise ValueError(
                f"TransNormerLLM: state has {len(state)} layers, the model has {layers}"
            )
        x, after = self.model(ids, state, mask)
        logits = self.lm_head(x)
        return (logits, after) if return_state else logits

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        tokens: int,
        *,
        state: States | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        return_state: bool = False,
    ) -> Any:
        """Continue `ids` token by token, in constant time and memory a token.

        Args:
            ids: `(B, N)`, `N >= 1`, following what `state` has seen.
            tokens: how many to add.
            state: of the tokens before `ids`.
            temperature: of sampling; 0 takes the likeliest token.
            generator: randomness of sampling.
            return_state: also return the states after all tokens but the last new one, which the
                next call starts with.

        Returns:
            New tokens `(B, tokens)`, and with `return_state` the states.

        Raises:
            ValueError: no token to start from, or a negative temperature.
        """
        if ids.dim() != 2 or not ids.shape[1] or tokens < 1:
            raise ValueError(
                "generate: ids must be (batch, length) with a token at least and tokens >= 1, got "
                f"{tuple(ids.shape)} and {tokens}"
            )
        if temperature < 0:
            raise ValueError(f"generate: temperature must be >= 0, got {temperature}")
        found = []
        for _ in range(tokens):
            logits, state = self(ids, state, return_state=True)
            last = logits[:, -1].float()
            if temperature:
                ids = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
            else:
                ids = last.argmax(-1, keepdim=True)
            found.append(ids)
        new = torch.cat(found, dim=1)
        return (new, state) if return_state else new
