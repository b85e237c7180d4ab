"""A model patched with `Full()` computes what it computed before, and is left as it was.

The tolerance is float32's: logits of size 1 to 10 agree with the unpatched model's to 2e-5.
"""

from __future__ import annotations

import pytest
import torch

import regard
from regard import Full

from .tiny import KINDS, ids, left_padding, make

TOLERANCE = 2e-5
ALL = (*KINDS, "gemma2", "gpt_oss")


def reference(kind: str):
    """What the kind of model can be compared with: these two have no sdpa form."""
    return make(kind, implementation="eager" if kind in ("gemma2", "gpt_oss") else "sdpa")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_logits(kind: str):
    model, x = reference(kind), ids(2, 21)
    expected = model(x).logits
    with regard.patch(model, Full()):
        close(model(x).logits, expected)
    assert torch.equal(model(x).logits, expected)


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_left_padding(kind: str):
    model, x, mask = reference(kind), ids(3, 21), left_padding(3, 21)
    expected = model(x, attention_mask=mask).logits
    with regard.patch(model, Full()):
        got = model(x, attention_mask=mask).logits
    close(got[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_right_padding(kind: str):
    model, x, mask = reference(kind), ids(3, 21), left_padding(3, 21).flip(1)
    expected = model(x, attention_mask=mask).logits
    with regard.patch(model, Full()):
        got = model(x, attention_mask=mask).logits
    close(got[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kind", ALL)
def test_greedy_generation(kind: str):
    model, x, mask = reference(kind), ids(3, 9), left_padding(3, 9)
    options = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "min_length": 23}
    expected = model.generate(x, **options)
    with regard.patch(model, Full()):
        assert torch.equal(model.generate(x, **options), expected)
    assert expected.shape[1] == 23


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_logits_of_every_decoding_step(kind: str, cache: str, padding: int):
    model, x, mask = reference(kind), ids(2, 9), left_padding(2, 9, padding)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "min_length": 21,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "disable_compile": True,
    }
    expected = model.generate(x, **options)
    with regard.patch(model, Full()):
        got = model.generate(x, cache_implementation=cache, **options)
    close(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_cache_filled_in_pieces(kind: str):
    model, x = reference(kind), ids(2, 24)
    expected = model(x).logits
    cache, got = None, []
    with regard.patch(model, Full()):
        for part in x.split([9, 1, 1, 8, 5], 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits)
    close(torch.cat(got, 1), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_packed_sequences(kind: str):
    model, x = reference(kind), ids(1, 20)
    positions = torch.cat([torch.arange(n) for n in (8, 1, 11)])[None]
    expected = model(x, position_ids=positions, use_cache=False).logits
    with regard.patch(model, Full()):
        got = model(x, position_ids=positions, use_cache=False).logits
    close(got, expected)
    alone = model(x[:, 9:], use_cache=False).logits
    close(got[:, 9:], alone)


@torch.no_grad()
def test_encoder():
    model, x, mask = make("bert"), ids(3, 15), left_padding(3, 15).flip(1)
    expected = model(x, attention_mask=mask).logits
    with regard.patch(model, Full()):
        got = model(x, attention_mask=mask).logits
    close(got[mask.bool()], expected[mask.bool()])
    moved = x.clone()
    moved[0, 14] = 1 + moved[0, 14] % 60
    with regard.patch(model, Full()):
        changed = model(moved, attention_mask=mask).logits
    assert not torch.allclose(changed[0, 0], got[0, 0])  # it does look ahead


@pytest.mark.parametrize("given", ["bool", "float"])
@torch.no_grad()
def test_a_mask_given_in_four_dimensions(given: str):
    model, x = make("llama", implementation="eager"), ids(2, 12)
    generator = torch.Generator().manual_seed(3)
    allowed = torch.rand(2, 1, 12, 12, generator=generator) > 0.4
    allowed = (allowed | torch.eye(12, dtype=torch.bool)).tril()
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = model(x, attention_mask=additive).logits
    with regard.patch(model, Full()):
        got = model(x, attention_mask=allowed if given == "bool" else additive).logits
    close(got, expected)


@torch.no_grad()
def test_a_score_bias_given_in_four_dimensions():
    model, x = make("llama", implementation="eager"), ids(2, 12)
    bias = torch.randn(1, 1, 12, 12).masked_fill(
        ~torch.ones(12, 12).tril().bool(), torch.finfo(torch.float32).min
    )
    expected = model(x, attention_mask=bias).logits
    with regard.patch(model, Full()):
        close(model(x, attention_mask=bias).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2"])
def test_gradients(kind: str):
    model, x = reference(kind), ids(2, 13)
    model(x, labels=x).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with regard.patch(model, Full()):
        model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            scale = float(expected[name].abs().max())
            assert float((parameter.grad - expected[name]).abs().max()) < 1e-4 * max(scale, 1e-3)
    assert any(name.endswith("k_proj.weight") for name in expected)


def test_dropout_is_drawn_in_training_only():
    model, x = make("llama", attention_dropout=0.5), ids(1, 12)
    with regard.patch(model, Full()), torch.no_grad():
        still = model(x).logits
        assert torch.equal(model(x).logits, still)
        model.train()
        torch.manual_seed(0)
        first = model(x).logits
        assert not torch.allclose(first, still)
        torch.manual_seed(0)
        assert torch.equal(model(x).logits, first)


@torch.no_grad()
def test_attention_weights_on_request():
    model, x = make("llama", implementation="eager"), ids(2, 11)
    expected = model(x, output_attentions=True).attentions
    with regard.patch(model, Full()):
        got = model(x, output_attentions=True).attentions
    for one, other in zip(got, expected, strict=True):
        close(one, other)
