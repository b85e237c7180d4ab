"""Tiny randomly initialised transformers models for the tests of `regard.models`."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

WINDOW = 6
VOCAB = 64
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_GQA = {**_SMALL, "num_key_value_heads": 2}
_MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
KINDS = ("llama", "qwen3", "gemma3", "mistral", "gpt_neox")


def _config(kind: str) -> Any:
    if kind == "llama":
        return hf.LlamaConfig(**_GQA)
    if kind == "qwen3":
        return hf.Qwen3Config(**_GQA, head_dim=8, use_sliding_window=True, **_MIXED)
    if kind == "gemma3":
        return hf.Gemma3TextConfig(**_GQA, head_dim=8, query_pre_attn_scalar=8, **_MIXED)
    if kind == "gemma2":
        return hf.Gemma2Config(**_GQA, head_dim=8, attn_logit_softcapping=0.5, **_MIXED)
    if kind == "mistral":
        return hf.MistralConfig(**_GQA, sliding_window=WINDOW)
    if kind == "gpt_neox":
        return hf.GPTNeoXConfig(**_SMALL)
    if kind == "gpt_oss":
        return hf.GptOssConfig(
            **_GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1, **_MIXED
        )
    if kind == "bert":
        return hf.BertConfig(**_SMALL)
    raise ValueError(kind)


def make(kind: str, seed: int = 0, implementation: str = "sdpa", **changes: Any) -> Any:
    """A model in eval mode; weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    config = _config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    config._attn_implementation = implementation
    auto = hf.AutoModelForMaskedLM if kind == "bert" else hf.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(8)
            if name.endswith("sinks"):
                weight.uniform_(-1, 1)
    return model


def ids(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, n), generator=generator)


def left_padding(batch: int, n: int, most: int = 5) -> torch.Tensor:
    """A 2-D attention mask in which entry b has `most * b / (batch - 1)` padded places in front."""
    mask = torch.ones(batch, n, dtype=torch.int64)
    for entry in range(batch):
        mask[entry, : most * entry // max(1, batch - 1)] = 0
    return mask
