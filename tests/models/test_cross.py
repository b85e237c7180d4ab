"""Cross-attention of encoder-decoders, watched and patched, against the models' own eager weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers as hf

import regard
from regard.core.data_masks import Keys
from regard.core.masks import Full
from regard.models import MapsProbe, Method, SiteProbe, StatsProbe
from regard.models.edit import Edit

from .tiny import ids, left_padding, make

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
_SIZES = {"vocab_size": 97, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}


def build(kind: str):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(**_SIZES, **sizes)).eval()
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    family = {"bart": ("Bart", {}), "marian": ("Marian", {"max_position_embeddings": 64})}[kind]
    config = getattr(hf, f"{family[0]}Config")(**_SIZES, **sizes, **family[1])
    if kind == "bart":
        return hf.BartForConditionalGeneration(config).eval()
    return hf.MarianMTModel(config).eval()


def own_weights(model, **inputs):
    """(L, B, H, T, S) as transformers gives them."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = model(**inputs, output_attentions=True, use_cache=False).cross_attentions
    model.set_attn_implementation(before)
    return torch.stack(found)


@pytest.mark.parametrize("target", [1, 7, 13])
@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
@torch.no_grad()
def test_the_weights_of_the_model_are_seen(kind, target):
    model, x = build(kind), ids(2, 9)
    inputs = {"input_ids": x, "attention_mask": left_padding(2, 9).flip(1)}
    inputs["decoder_input_ids"] = ids(2, target, seed=3)
    expected, logits = own_weights(model, **inputs), model(**inputs).logits
    stats = StatsProbe(["received", "entropy"])
    probes = (SiteProbe("weights"), stats, MapsProbe())
    with regard.watch(model, *probes, attention="cross") as seen:
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, logits, **TOLERANCE)
    weights, found, maps = seen.result()
    torch.testing.assert_close(torch.stack(list(weights[0].values())), expected, **TOLERANCE)
    entropy = -(expected * expected.clamp(min=1e-30).log()).sum(-1)
    for layer in (0, 1):
        mine = found[0][layer]
        torch.testing.assert_close(mine["received"].float(), expected[layer].sum(2), **TOLERANCE)
        torch.testing.assert_close(mine["entropy"].float(), entropy[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(maps.window(layer, 2), expected[layer][:, 2], **TOLERANCE)
    part = maps.window(1, 3, (target // 2, target), (2, 8))
    torch.testing.assert_close(part, expected[1][:, 3, target // 2 :, 2:8], **TOLERANCE)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_decoding_step_by_step_is_the_whole(kind):
    model, x, target = build(kind), ids(1, 9), ids(1, 6, seed=3)
    with regard.watch(model, StatsProbe(["received"]), attention="cross") as whole:
        model(input_ids=x, decoder_input_ids=target)
    probes = (StatsProbe(["received"]), MapsProbe(), SiteProbe("weights"))
    with regard.watch(model, *probes, attention="cross"):
        encoded, cache = model.get_encoder()(x), None
        for t in range(6):
            given = {"encoder_outputs": encoded, "decoder_input_ids": target[:, t : t + 1]}
            cache = model(**given, past_key_values=cache, use_cache=True).past_key_values
    expected = whole.result()[0][1]["received"]
    torch.testing.assert_close(probes[0].joined()[1]["received"], expected, **TOLERANCE)
    torch.testing.assert_close(
        probes[1].window(1, 0)[0], torch.cat([one[1] for one in probes[2].result()], 2)[0, 0]
    )
    with pytest.raises(ValueError, match=r"rows must be .* within the 6 tokens"):
        probes[1].window(1, 0, rows=(0, 9))


@dataclass
class Silence(Method):
    """Two heads of the first layer put out nothing, on rows after the first."""

    def edits(self):
        def later(rows, passing, spans):
            return rows > 0

        return [Edit("heads", lambda x, site: 0 * x, layers=[0], heads=[0, 2], rows=later)]


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_patching(kind):
    model, x = build(kind), ids(2, 9)
    inputs = {"input_ids": x, "decoder_input_ids": ids(2, 7, seed=3)}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
    expected, tokens = model(**inputs).logits, model.generate(x, **options)
    with regard.patch(model, Full(), attention="cross"):
        torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)
        assert torch.equal(model.generate(x, **options), tokens)

    # a mask over the source is the model's own padding mask
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 4:] = valid[1, 7:] = False
    encoded = model.get_encoder()(x)
    given = {"encoder_outputs": encoded, "decoder_input_ids": inputs["decoder_input_ids"]}
    masked = model(**given, attention_mask=valid.long()).logits
    with regard.patch(model, Keys(valid), attention="cross"), regard.patch(model, Full()):
        torch.testing.assert_close(model(**given).logits, masked, **TOLERANCE)

    attn = model.get_decoder().block[0].layer[1].EncDecAttention if kind == "t5" else None
    out = attn.o if attn else model.get_decoder().layers[0].encoder_attn.out_proj

    def by_hand(module, args):
        z = args[0].unflatten(-1, (4, 8)).clone()
        z[:, 1:, [0, 2]] = 0
        return (z.flatten(-2),)

    handle = out.register_forward_pre_hook(by_hand)
    silent = model(**inputs).logits
    handle.remove()
    with regard.patch(model, Silence(), attention="cross"):
        torch.testing.assert_close(model(**inputs).logits, silent, **TOLERANCE)
    assert not torch.allclose(silent, expected, atol=1e-4)
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_t5_sites_hold_what_a_part_adds():
    """T5's blocks add the residual themselves; the sites are the parts without it."""
    model = build("t5")
    block = model.get_decoder().block[0]
    parts = {"self": block.layer[0].SelfAttention, "cross": block.layer[1].EncDecAttention}
    inputs = {"input_ids": ids(1, 5), "decoder_input_ids": ids(1, 4)}
    for attention, part in parts.items():
        kept = []
        handle = part.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0]))
        with regard.watch(model, SiteProbe("attn"), SiteProbe("mlp"), attention=attention) as seen:
            model(**inputs)
        handle.remove()
        assert torch.equal(seen.result()[0][0][0], kept[0])
        assert seen.result()[1][0][0].shape == kept[0].shape


def test_mistakes():
    words = "LlamaModel has no cross-attention that regard knows"
    probe, model = StatsProbe(["entropy"]), make("llama")
    with pytest.raises(ValueError, match=words), regard.watch(model, probe, attention="cross"):
        pass
    words = "attention must be 'self' or 'cross', got 'both'"
    with pytest.raises(ValueError, match=words), regard.patch(model, Full(), attention="both"):
        pass
