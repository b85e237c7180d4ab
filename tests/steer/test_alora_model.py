"""ALoRA's adapters in models: against layers that were swapped, and passes without a cache."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tests.models.tiny import ids, left_padding, make
from torch import nn
from transformers import DynamicCache, StaticCache

import regard
from regard.bench.steer_names import build
from regard.models import fork
from regard.steer.alora import ALoRA, ALoRALinear
from regard.steer.alora_model import ALoRAAdapters
from regard.steer.mote import TunedExperts

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
CLOSE = {"atol": 3e-5, "rtol": 3e-5}


def adapted(model, std=0.3, **options):
    torch.manual_seed(0)
    method = ALoRAAdapters.of(model, r=4, **options)
    for adapter in method.adapters:
        nn.init.normal_(adapter.B.weight, std=std)
    return method


def targets(kind):
    return {"targets": ("query_key_value",)} if kind == "gpt_neox" else {}


def in_parts(model, x, cache, *stops):
    parts, at = [], 0
    for stop in stops:
        out = model(x[:, at:stop], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, stop
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


def test_in_a_model_it_is_the_layer_swapped():
    """The oracle: the model with its linear layers replaced by ALoRALinear, without any hook."""
    model, x = make("llama"), ids(2, 14)
    method = adapted(model)
    with regard.patch(model, method):
        got = model(x).logits
        got.sum().backward()
    grads = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    for name, adapter in zip(method.names, method.adapters, strict=True):
        at, target = name.split(".")
        block = model.model.layers[int(at)].self_attn
        swapped = ALoRALinear(getattr(block, target), 4)
        for part in "AqkvoB":
            setattr(swapped, part, getattr(adapter, part))
        setattr(block, target, swapped)
    want = model(x, use_cache=False).logits
    want.sum().backward()
    torch.testing.assert_close(got, want, **CLOSE)
    for grad, parameter in zip(grads, method.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-3, rtol=1e-3)
    assert any(grad.any() for grad in grads)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt_neox"])
def test_in_a_model_cached_is_uncached_and_leaving_restores(kind):
    model, x = make(kind), ids(2, 14)
    before = model(x).logits
    with regard.patch(model, adapted(model, std=0.0, **targets(kind))):
        torch.testing.assert_close(model(x).logits, before, **CLOSE)
    method = adapted(model, **targets(kind))
    with regard.patch(model, method):
        whole = model(x, use_cache=False).logits
        torch.testing.assert_close(model(x).logits, whole, **CLOSE)
        for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
            got, kept = in_parts(model, x, cache, 5, 12, 13, 14)
            torch.testing.assert_close(got, whole, **CLOSE)
        # Without the model's sizes a cache has no window to fall out of: it can be cropped.
        _, kept = in_parts(model, x, DynamicCache(), 5, 13, 14)
        kept.crop(-2)
        torch.testing.assert_close(
            model(x[:, 12:], past_key_values=kept).logits, whole[:, 12:], **CLOSE
        )
        slow = model.generate(x, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(x, **GREEDY), slow)
    assert not torch.allclose(whole, before, atol=1e-2)
    assert torch.equal(model(x).logits, before)
    with pytest.raises(RuntimeError), regard.patch(model, method):
        model(x)
        raise RuntimeError
    assert torch.equal(model(x).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_neox"])
def test_beams_are_uncached_beams(kind):
    """Beam search reorders the cache; the adapters' keys follow."""
    model, x = make(kind), ids(2, 10)
    beams = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 4, "num_return_sequences": 4}
    reordered = []
    with regard.patch(model, adapted(model, **targets(kind))):
        want = model.generate(x, use_cache=False, **beams)
        reorder = DynamicCache.reorder_cache

        def count(cache, order):
            reordered.append(order.tolist() != list(range(len(order))))
            return reorder(cache, order)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DynamicCache, "reorder_cache", count)
            assert torch.equal(model.generate(x, **beams), want)
    assert any(reordered), "no beam overtook another: the test shows nothing"


@torch.no_grad()
def test_forked_static_and_drafted_caches():
    model, x = make("llama"), ids(1, 14)
    with regard.patch(model, adapted(model)):
        whole = model(x, use_cache=False).logits
        _, cache = in_parts(model, x[:, :10], None, 6, 10)
        for copy in (fork(model, cache), deepcopy(cache), cache):
            got = model(x[:, 10:], past_key_values=copy).logits
            torch.testing.assert_close(got, whole[:, 10:], **CLOSE)
        static = StaticCache(config=model.config, max_cache_len=20)
        for _ in range(2):
            got, _ = in_parts(model, x, static, 6, 13, 14)
            torch.testing.assert_close(got, whole, **CLOSE)
            static.reset()
        slow = model.generate(x, use_cache=False, **GREEDY)
        # Drafts that are refused are cropped out of the cache again.
        assert torch.equal(model.generate(x, prompt_lookup_num_tokens=3, **GREEDY), slow)


@torch.no_grad()
def test_padding_reaches_the_adapters():
    model, x = make("llama"), ids(2, 14)
    mask = left_padding(2, 14, 3)
    long = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with regard.patch(model, adapted(model)):
        both = model.generate(x, attention_mask=mask, **long)
        alone = model.generate(x[1:, 3:], **long)
    for a, b in zip(alone.logits, both.logits, strict=True):
        torch.testing.assert_close(a[0], b[1], **CLOSE)


@torch.no_grad()
def test_layers_of_the_patch_and_several_together():
    model, x = make("llama"), ids(2, 14)
    first, second = adapted(model), adapted(model, targets=("o_proj",))
    part = adapted(model, layers=[1, 2])
    for name, adapter in zip(part.names, part.adapters, strict=True):
        adapter.load_state_dict(first.adapters[first.names.index(name)].state_dict())
    with regard.patch(model, part):
        want = model(x).logits
    with regard.patch(model, first, layers=[1, 2]):
        assert torch.equal(model(x).logits, want)
    with regard.patch(model, first, second):
        both, _ = in_parts(model, x, None, 9, 14)
        torch.testing.assert_close(model(x, use_cache=False).logits, both, **CLOSE)
    with regard.patch(model, second), regard.patch(model, first):
        torch.testing.assert_close(model(x).logits, both, **CLOSE)
    assert not torch.allclose(both, want, atol=1e-2)


@torch.no_grad()
def test_file(tmp_path):
    model, x, path = make("llama"), ids(2, 14), tmp_path / "alora.safetensors"
    method = adapted(model, heads=4, alpha=3.0, residual=False, layers=[0, 2])
    method.save(path)
    read = ALoRAAdapters.load(path)
    with regard.patch(model, method):
        want = model(x).logits
    with regard.patch(model, build("alora", [f"file={path}"])):
        assert torch.equal(model(x).logits, want)
    assert read.names == ["0.q_proj", "0.v_proj", "2.q_proj", "2.v_proj"]
    TunedExperts().save(path)
    with pytest.raises(ValueError, match=r"was not written by ALoRAAdapters\.save"):
        ALoRAAdapters.load(path)


def test_training_learns_and_leaves_the_base():
    model, x = make("llama"), ids(4, 14)
    state = {name: w.clone() for name, w in model.state_dict().items()}
    method = adapted(model, std=0.0)
    optimizer, losses = torch.optim.Adam(method.parameters(), 1e-2), []
    with regard.patch(model, method):
        for _ in range(15):
            loss = model(x, labels=x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def entered(method, kind="llama", mask=None):
    with regard.patch(make(kind), method) as model:
        model(ids(1, 4), attention_mask=mask)


def of(kind, **changes):
    return ALoRAAdapters.of(make(kind, **changes), r=4)


def filled_before():
    model, cache = make("llama"), DynamicCache()
    model(ids(1, 5), past_key_values=cache)
    with regard.patch(model, ALoRAAdapters.of(model, r=4)):
        model(ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ALoRAAdapters({"q_proj": ALoRA(3, 3)}), "keys must be 'layer.target'"),
        (lambda: of("gpt_neox"), "no linear layer 'q_proj'"),
        (lambda: entered(of("llama"), "gpt_neox"), "no linear layer 'q_proj'"),
        (lambda: entered(of("llama", hidden_size=64, head_dim=16)), "made for another model"),
        (lambda: entered(of("llama", num_hidden_layers=5)), "'4.q_proj', but the model has 4"),
        (lambda: entered(of("llama"), mask=torch.ones(1, 1, 4, 4)), r"must be \(B, M\): padding"),
        (filled_before, "enter the patch before the prompt is read"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
