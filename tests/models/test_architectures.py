"""Models of other shapes: with images, encoder-decoders, checkpointed, half precision."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import regard
from regard import Causal, Full, Sinks, SlidingWindow
from regard.models import Edit, Method, SiteProbe, Spans, StatsProbe

from .tiny import ids, left_padding, make

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


class Same(Method):
    """Edits that change nothing."""

    def __init__(self, *sites: str) -> None:
        self.sites = sites

    def edits(self):
        return [Edit(site, lambda y, at: y) for site in self.sites]


def llava():
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=6,
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**_TEXT), image_token_index=60
    )
    x = torch.tensor([[1, 5, 6, *[60] * 16, 7, 8, 9, 10]])
    inputs = {"input_ids": x, "pixel_values": torch.randn(1, 3, 24, 24)}
    return hf.LlavaForConditionalGeneration(config).eval(), inputs


def qwen2_vl():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    config = hf.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )
    x = torch.tensor([[1, 5, 58, *[60] * 16, 59, 7, 8, 9, 10]])
    inputs = {
        "input_ids": x,
        "pixel_values": torch.randn(64, 96),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (x == 60).int(),
    }
    return hf.Qwen2VLForConditionalGeneration(config).eval(), inputs


@pytest.mark.parametrize("make_it", [llava, qwen2_vl])
@torch.no_grad()
def test_models_with_images(make_it):
    model, inputs = make_it()
    expected = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for method in (Full(), Same("positions", "weights", "heads", "resid", "lm_logits")):
        with regard.patch(model, method), regard.watch(model, StatsProbe(["entropy"])) as seen:
            if isinstance(method, Full):
                torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)
                assert list(seen.result()[0]) == [0, 1, 2]  # the text decoder, not the image tower
            else:
                with pytest.raises(ValueError, match="has edited logits or weights"):
                    model(**inputs)
    with regard.patch(model, Same("positions", "weights", "heads", "resid", "lm_logits")):
        torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    spans = Spans.where(inputs["input_ids"][0], image=60)
    assert len(spans.positions("image", 30)) == 16


@torch.no_grad()
def test_an_image_tower_alone():
    model, inputs = llava()
    tower = model.model.vision_tower
    expected = tower(inputs["pixel_values"]).last_hidden_state
    with regard.patch(tower, Full()), regard.watch(tower, SiteProbe("weights")) as seen:
        got = tower(inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert seen.result()[0][0].shape == (1, 4, 17, 17)  # all patches see all


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_decoder_of_an_encoder_decoder(kind: str):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        model = hf.T5ForConditionalGeneration(hf.T5Config(**_SEQ2SEQ, **sizes)).eval()
    else:
        sides = ("encoder", "decoder")
        sizes = {f"{side}_{what}": 2 for side in sides for what in ("layers", "attention_heads")}
        sizes |= {f"{side}_ffn_dim": 64 for side in sides}
        model = hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ, **sizes)).eval()
    x, mask = ids(2, 9), left_padding(2, 9).flip(1)
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
    with torch.no_grad():
        expected = model(x, attention_mask=mask, decoder_input_ids=x[:, :7]).logits
        tokens = model.generate(x, **options, do_sample=False)
        with regard.patch(model, Full()):
            got = model(x, attention_mask=mask, decoder_input_ids=x[:, :7]).logits
            assert torch.equal(model.generate(x, **options, do_sample=False), tokens)
        torch.testing.assert_close(got, expected, **TOLERANCE)
        with regard.patch(model, SlidingWindow(1)):  # of the decoder itself, not of what it reads
            narrow = model(x, attention_mask=mask, decoder_input_ids=x[:, :7]).logits
        torch.testing.assert_close(narrow[:, :2], expected[:, :2], **TOLERANCE)
        assert not torch.allclose(narrow[:, 2:], expected[:, 2:], atol=1e-5)


def test_gradient_checkpointing():
    model, x = make("llama").train(), ids(1, 9)
    model(x, labels=x).loss.backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with regard.patch(model, Full()):
        model(x, labels=x, use_cache=False).loss.backward()
    got = model.model.layers[0].self_attn.q_proj.weight.grad
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@torch.no_grad()
def test_assisted_generation_crops_the_cache():
    model, drafter, x = make("llama"), make("llama", seed=5), ids(1, 9)
    options = {"max_new_tokens": 12, "do_sample": False}
    method = Causal() & (SlidingWindow(4) | Sinks(2))
    with regard.patch(model, method):
        expected = model.generate(x, **options)
        got = model.generate(x, assistant_model=drafter, **options)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_half_precision():
    model, x = make("qwen3").bfloat16(), ids(2, 14)
    expected = model(x).logits.float()
    size = float(expected.abs().max())
    for method in (Full(), Same("logits", "weights", "heads")):
        with regard.patch(model, method):
            got = model(x).logits
        assert got.dtype == torch.bfloat16
        assert float((got.float() - expected).abs().max()) < 0.05 * size
