"""Selectors in running models: limits, decoding, batches with padding, what probes see of them."""

from __future__ import annotations

import copy

import pytest
import torch

import regard
from regard import Causal, Full
from regard.models import Method, SelectMethod, StatsProbe, fork
from regard.sparse.adaptive import AdaptiveTopK
from regard.sparse.generic import BlockTopK, ExactTopK, Streaming, VerticalSlash

from .tiny import ids, left_padding, make

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
ALL = [
    ExactTopK(50, 4),
    BlockTopK(50, 4),
    AdaptiveTopK(50, 4),
    Streaming(50, 4),
    VerticalSlash(100, 4),
]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("selector", ALL, ids=lambda s: type(s).__name__)
def test_choosing_everything_changes_nothing(kind, selector):
    model, x, mask = make(kind), ids(2, 21), left_padding(2, 21, 3)
    expected = model(x, attention_mask=mask).logits
    with regard.patch(model, selector):
        found = model(x, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **TOLERANCE)


@torch.no_grad()
def test_streaming_blocks_are_the_mask_of_the_same_blocks():
    model, x = make("llama"), ids(1, 24)
    i, j = torch.arange(24)[:, None] // 4, torch.arange(24)[None] // 4
    mask = regard.Dense((j <= i) & ((i - j < 2) | (j == 0)))
    with regard.patch(model, Streaming(3, 4)):
        chosen = model(x).logits
    with regard.patch(model, mask):
        torch.testing.assert_close(model(x).logits, chosen, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("selector", [BlockTopK(3, 4), BlockTopK(3, 4, summary="bounds")])
def test_cached_decoding_equals_the_step_without_state(selector):
    model, x = make("llama"), ids(2, 40)

    def scores(using):
        with regard.patch(model, SelectMethod(using, prefill=False)):
            out = model(x[:, :20], use_cache=True)
            steps = []
            for token in x[:, 20:].split(1, dim=1):
                out = model(token, past_key_values=out.past_key_values)
                steps.append(out.logits)
        return torch.cat(steps, 1)

    plain = {name: getattr(selector, name) for name in selector.__dataclass_fields__}

    class Fresh(type(selector)):
        def select(self, q, k, *, mask=None, state=None):
            return super().select(q, k, mask=mask, state=None)

    assert torch.equal(scores(selector), scores(Fresh(**plain)))


@torch.no_grad()
def test_prefill_or_decoding_alone():
    model, x = make("llama"), ids(1, 40)
    dense = model(x).logits
    with regard.patch(model, SelectMethod(Streaming(2, 4), prefill=False)):
        torch.testing.assert_close(model(x).logits, dense, **TOLERANCE)
    cache = model(x, use_cache=True).past_key_values
    with regard.patch(model, SelectMethod(Streaming(2, 4), decode=False)):
        assert (model(x).logits - dense).abs().max() > 1e-3
        found = model(x[:, :1], past_key_values=cache).logits
    cache.crop(-1)
    torch.testing.assert_close(found, model(x[:, :1], past_key_values=cache).logits, **TOLERANCE)
    cache.crop(-1)
    # a question of few tokens is no prefill either
    plain = model(x[:, :6], past_key_values=copy.deepcopy(cache)).logits
    for few, same in ((6, True), (5, False)):
        with regard.patch(model, SelectMethod(Streaming(2, 4), decode=False, few=few)):
            found = model(x[:, :6], past_key_values=copy.deepcopy(cache)).logits
        assert torch.allclose(found, plain, **TOLERANCE) == same
    with regard.patch(model, Streaming(2, 4), layers=[]):
        torch.testing.assert_close(model(x).logits, dense, **TOLERANCE)


@torch.no_grad()
def test_first_layers_may_stay_dense():
    model, x = make("llama"), ids(1, 40)
    with regard.patch(model, SelectMethod(Streaming(2, 4), first=2)):
        found = model(x).logits
    with regard.patch(model, Streaming(2, 4), layers=[2, 3]):
        assert torch.equal(model(x).logits, found)
    plain = model(x).logits
    with regard.patch(model, SelectMethod(Streaming(2, 4), first=4)):
        torch.testing.assert_close(model(x).logits, plain, **TOLERANCE)
    with pytest.raises(ValueError, match="first must be a layer >= 0 and few >= 1, got -1 and 1"):
        SelectMethod(Streaming(), first=-1)


@torch.no_grad()
def test_generate_under_a_selector_is_greedy_decoding_under_it():
    model, x = make("llama"), ids(1, 17)
    with regard.patch(model, BlockTopK(3, 4)):
        found = model.generate(x, max_new_tokens=8, do_sample=False)
        grown, cache = x, None
        for _ in range(8):
            new = grown if cache is None else grown[:, -1:]
            out = model(new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            grown = torch.cat([grown, out.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, grown)


@torch.no_grad()
def test_a_forked_cache_goes_on_with_what_was_kept():
    model, x = make("llama"), ids(1, 40)

    class Counts(Method):
        def attend(self, call, inner):
            call.cache_store["rows"] = call.cache_store.get("rows", 0) + call.n
            seen.append(call.cache_store["rows"])
            return inner(call)

    seen = []
    with regard.patch(model, Counts(), layers=[0]):
        cache = model(x[:, :30], use_cache=True).past_key_values
        branch = fork(model, cache)
        first = model(x[:, 30:31], past_key_values=branch).logits
        again = model(x[:, 30:31], past_key_values=cache).logits
        model(x[:, 31:32], past_key_values=branch)
    assert seen == [30, 31, 31, 32] and torch.equal(first, again)
    assert cache.get_seq_length() == 31 and branch.get_seq_length() == 32


@torch.no_grad()
def test_probes_see_what_a_selector_left():
    model, x = make("llama"), ids(1, 24)
    probe = StatsProbe(["received"])
    with (
        regard.patch(model, Streaming(2, 4, sinks=0, recent=2)),
        regard.watch(model, probe) as seen,
    ):
        model(x)
    received = seen.result()[0][2]["received"]
    mask = Causal() & regard.Dense(
        (torch.arange(24)[:, None] // 4 - torch.arange(24)[None] // 4) < 2
    )
    with regard.patch(model, mask), regard.watch(model, StatsProbe(["received"])) as plain:
        model(x)
    torch.testing.assert_close(received, plain.result()[0][2]["received"], **TOLERANCE)


def test_errors():
    model, x = make("llama"), ids(1, 8)
    with (
        pytest.raises(ValueError, match=r"another method has chosen already"),
        regard.patch(model, Streaming(2, 4), BlockTopK(2, 4)),
    ):
        model(x)
    with pytest.raises(ValueError, match="expected a Selector, got Full"):
        SelectMethod(Full())
    with pytest.raises(ValueError, match="nothing to do"):
        SelectMethod(Streaming(), prefill=False, decode=False)
