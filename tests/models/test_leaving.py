"""Leaving a patch restores the model; patches nest; models do not see each other."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import regard
from regard import Causal, Full, Sinks, SlidingWindow
from regard.models import Edit, Method

from .tiny import ids, make


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model) -> tuple:
    return hooks(model), model.config._attn_implementation, model.config.to_json_string()


class Zero(Method):
    """Replaces the output of every head by zero."""

    def edits(self):
        return [Edit("heads", lambda x, site: torch.zeros_like(x))]


@torch.no_grad()
def test_restored_after_an_exception_in_a_method():
    model, x = make("gemma3"), ids(1, 9)
    before, expected = state(model), model(x).logits

    class Breaks(Method):
        def attend(self, call, inner):
            if call.decoding and call.layer == 2:
                raise RuntimeError("in the middle of generate")
            return inner(call)

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        regard.patch(model, Zero(), Breaks()),
    ):
        model.generate(x, max_new_tokens=5, do_sample=False)
    assert state(model) == before
    assert torch.equal(model(x).logits, expected)


def test_nothing_is_left_when_entering_fails():
    model = make("llama")
    before = state(model)

    class Wrong(Method):
        def edits(self):
            return [Edit("heads", lambda x, site: x), Edit("mlp", lambda x, site: x, layers=[9])]

    with (
        pytest.raises(ValueError, match=r"layers \[9\], but the model has 4"),
        regard.patch(model, Zero(), Wrong()),
    ):
        pass
    assert state(model) == before


@torch.no_grad()
def test_nested_patches_compose_and_come_off_in_order():
    model, x = make("llama"), ids(1, 16)
    plain = model(x).logits
    with regard.patch(model, SlidingWindow(7)):
        outer = model(x).logits
        with regard.patch(model, Sinks(2) | SlidingWindow(3)):
            both = model(x).logits
        assert torch.equal(model(x).logits, outer)
    with regard.patch(model, SlidingWindow(7) & (Sinks(2) | SlidingWindow(3))):
        torch.testing.assert_close(model(x).logits, both)
    assert not torch.allclose(both, outer) and not torch.allclose(outer, plain)
    assert torch.equal(model(x).logits, plain)


@torch.no_grad()
def test_the_inner_patch_sees_what_the_outer_did():
    model, x = make("llama"), ids(1, 6)
    seen = []

    def double(y, site):
        return 2 * y

    def look(y, site):
        seen.append(y)
        return y + 1

    class One(Method):
        def __init__(self, fn, site):
            self.fn, self.site = fn, site

        def edits(self):
            return [Edit(self.site, self.fn, layers=[1])]

    for site in ("heads", "weights", "resid"):
        seen.clear()
        with regard.patch(model, One(look, site)):
            model(x)
        with regard.patch(model, One(double, site)), regard.patch(model, One(look, site)):
            model(x)
        torch.testing.assert_close(seen[1], 2 * seen[0])


@torch.no_grad()
def test_two_models_with_one_config():
    config = make("llama").config
    first, second = (hf.LlamaForCausalLM(config).eval() for _ in range(2))
    x = ids(2, 14)
    plain = first(x).logits, second(x).logits
    with regard.patch(first, SlidingWindow(2)):
        narrow = first(x).logits
        assert not torch.allclose(narrow, plain[0])
        assert torch.equal(second(x).logits, plain[1])
        assert torch.equal(second.generate(x, max_new_tokens=3, do_sample=False)[:, :14], x)
        with regard.patch(second, SlidingWindow(1)):
            assert torch.equal(first(x).logits, narrow)
            assert not torch.allclose(second(x).logits, plain[1])
        assert torch.equal(second(x).logits, plain[1])
    assert torch.equal(first(x).logits, plain[0])
    assert config._attn_implementation == "sdpa"


@torch.no_grad()
def test_leaving_in_another_order():
    model, x = make("llama"), ids(1, 9)
    before, plain = state(model), model(x).logits
    one, two = regard.patch(model, SlidingWindow(3)), regard.patch(model, Zero())
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    with regard.patch(model, Full()):
        pass
    two.__exit__(None, None, None)
    assert state(model) == before
    assert torch.equal(model(x).logits, plain)


@torch.no_grad()
def test_the_same_engine_through_the_model_and_its_decoder():
    model, x = make("llama"), ids(1, 12)
    with regard.patch(model.model, SlidingWindow(2)):
        inside = model(x).logits
    with regard.patch(model, SlidingWindow(2)):
        assert torch.equal(model(x).logits, inside)


def test_models_without_the_attention_interface():
    config = hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=10)
    with (
        pytest.raises(ValueError, match="BloomModel does not call its attention through"),
        regard.patch(hf.BloomForCausalLM(config), Causal()),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected a transformers model, got Linear"),
        regard.patch(torch.nn.Linear(2, 2), Causal()),
    ):
        pass


def test_mistakes_get_one_line():
    model = make("llama")
    with (
        pytest.raises(ValueError, match="expected a Method, a Mask or a Selector, got int"),
        regard.patch(model, 3),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"layers \[4\], but the model has 4"),
        regard.patch(model, Full(), layers=[0, 4]),
    ):
        pass
    with pytest.raises(ValueError, match="no method given"), regard.patch(model):
        pass
    with pytest.raises(ValueError, match="no site 'head'"):
        Edit("head", lambda x, site: x)
    with pytest.raises(ValueError, match="no row policy 'first'"):
        Edit("heads", lambda x, site: x, rows="first")
