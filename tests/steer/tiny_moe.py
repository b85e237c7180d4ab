"""Tiny mixture-of-experts models."""

from __future__ import annotations

import torch
import transformers as hf

KINDS = ("qwen3_moe", "olmoe")


def make(kind="qwen3_moe", norm=True, seed=0, depth=3):
    torch.manual_seed(seed)
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": norm,
        "pad_token_id": 0,
    }
    if kind == "qwen3_moe":
        more = {"head_dim": 8, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**small, **more))
    else:
        model = hf.OlmoeForCausalLM(hf.OlmoeConfig(**small))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(8)
    return model.eval()
