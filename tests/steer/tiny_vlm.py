"""Tiny random vision-language models of transformers, with inputs of one image and their spans."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from regard.models import Spans

IMAGE = 60
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llava(seed: int = 0) -> tuple[Any, dict[str, Any], Spans]:
    """LLaVA: 16 image tokens at 3 to 19, the question behind them."""
    torch.manual_seed(seed)
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=6,
    )
    text = hf.LlamaConfig(**_TEXT)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    ids = torch.tensor([[1, 5, 6, *[IMAGE] * 16, 7, 8, 9, 10]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24)}
    model = _sharpen(hf.LlavaForConditionalGeneration(config).eval())
    return model, inputs, Spans.of(23, image=(3, 19), text=(19, 23))


_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
_QWEN: dict[str, Any] = {
    "text_config": {**_TEXT, "rope_parameters": _ROPE},
    "image_token_id": IMAGE,
    "video_token_id": 61,
    "vision_start_token_id": 58,
    "vision_end_token_id": 59,
}


def qwen2_vl(seed: int = 0) -> tuple[Any, dict[str, Any], Spans]:
    """Qwen2-VL, positions on three axes: 16 image tokens at 3 to 19, the question behind them."""
    torch.manual_seed(seed)
    config = hf.Qwen2VLConfig(vision_config={**_TOWER, "embed_dim": 32}, **_QWEN)
    return _with_image(hf.Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl(seed: int = 0) -> tuple[Any, dict[str, Any], Spans]:
    """Qwen2.5-VL on the inputs of :func:`qwen2_vl`."""
    torch.manual_seed(seed)
    sizes = {"intermediate_size": 64, "out_hidden_size": 32, "window_size": 16}
    tower = {**_TOWER, **sizes, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(vision_config=tower, **_QWEN)
    return _with_image(hf.Qwen2_5_VLForConditionalGeneration, config)


def _with_image(model: Any, config: Any) -> tuple[Any, dict[str, Any], Spans]:
    ids = torch.tensor([[1, 5, 58, *[IMAGE] * 16, 59, 7, 8, 9, 10]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(64, 96),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return _sharpen(model(config).eval()), inputs, Spans.of(24, image=(3, 19), text=(20, 24))


VLMS = {"llava": llava, "qwen2_vl": qwen2_vl}


def _sharpen(model: Any) -> Any:
    """Weights large enough for attention to matter."""
    with torch.no_grad():
        for name, weight in model.get_decoder().named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(8)
    return model
