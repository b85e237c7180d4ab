"""LongHeads in running models: what it keeps between calls, padding, grouped heads, what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.models.tiny import ids, left_padding, make

import regard
from regard import Causal, SlidingWindow
from regard.core.rope import rope
from regard.models import Edit, Method
from regard.sparse.longheads import LongHeads
from regard.sparse.longheads_cache import ChunkFeatures, longheads_attention
from regard.sparse.longheads_chunks import ChunkSelect

SMALL = LongHeads(4, 16, 16)
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module")
def llama():
    return make("llama", num_hidden_layers=2)


@torch.no_grad()
def test_up_to_start_nothing_changes(llama):
    x = ids(2, 40)
    want = llama(x).logits
    with regard.patch(llama, LongHeads(4, 16, 64)):
        torch.testing.assert_close(llama(x).logits, want)
    with regard.patch(llama, SMALL):
        out = llama(x).logits
    torch.testing.assert_close(out[:, :16], want[:, :16], **TOLERANCE)
    assert (out[:, 16:] - want[:, 16:]).abs().amax() > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_a_layer_is_the_function(kind):
    model, x = make(kind, num_hidden_layers=2), ids(2, 37)
    if kind == "qwen3":
        model.config.layer_types = ["full_attention"] * 2
    seen = []

    class Compares(Method):
        def attend(self, call, inner):
            out = inner(call)
            rotary = call.rotary
            q, k = (rotary.unrotate(x, rotary.key_positions) for x in (call.q, call.k))
            want = longheads_attention(q, k, call.v, ChunkSelect(4, 16, 16), scale=call.scale)
            seen.append((out, want))
            return out

    with regard.patch(model, SMALL, Compares(), layers=[0]):  # the last one is asked first
        model(x)
    (got, want), *rest = seen
    assert not rest
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("prompt", [11, 21])
@torch.no_grad()
def test_cached_is_uncached(llama, prompt):
    x = ids(2, 32)
    with regard.patch(llama, SMALL):
        want = llama(x, use_cache=False).logits
        out = llama(x[:, :prompt], use_cache=True)
        cache, parts = out.past_key_values, [out.logits]
        for t in range(prompt, 28):
            parts.append(llama(x[:, t : t + 1], past_key_values=cache).logits)
        parts.append(llama(x[:, 28:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, **TOLERANCE)


@torch.no_grad()
def test_left_padding_and_generation(llama):
    x, mask = ids(2, 30), left_padding(2, 30, 7)
    with regard.patch(llama, SMALL):
        together = llama(x, attention_mask=mask).logits
        for entry, pad in enumerate((0, 7)):
            alone = llama(x[entry : entry + 1, pad:]).logits[0]
            torch.testing.assert_close(together[entry, pad:], alone, **TOLERANCE)
        made = llama.generate(
            x, attention_mask=mask, max_new_tokens=5, min_length=35, do_sample=False
        )
        for entry, pad in enumerate((0, 7)):
            one = llama.generate(
                x[entry : entry + 1, pad:], max_new_tokens=5, min_length=35 - pad, do_sample=False
            )
            assert one[0].tolist() == made[entry, pad:].tolist()


@torch.no_grad()
def test_positions_may_start_anywhere(llama):
    x = ids(1, 40)
    with regard.patch(llama, SMALL):
        want = llama(x).logits
        moved = llama(x, position_ids=torch.arange(100, 140)[None]).logits
    torch.testing.assert_close(moved, want, **TOLERANCE)


def test_exclude_self_is_for_prefill(llama):
    x = ids(1, 30)
    method = LongHeads(4, 16, 16, exclude_self=True)
    with torch.no_grad(), regard.patch(llama, method):
        out = llama(x, use_cache=True)
        step = llama(x[:, :1], past_key_values=out.past_key_values).logits
    with torch.no_grad(), regard.patch(llama, SMALL):
        plain = llama(x, use_cache=True)
        other = llama(x[:, :1], past_key_values=plain.past_key_values).logits
    torch.testing.assert_close(out.logits[:, :16], plain.logits[:, :16])
    assert (out.logits[:, 16:] - plain.logits[:, 16:]).abs().amax(-1).min() > 0
    assert torch.isfinite(step).all() and torch.isfinite(other).all()


@torch.no_grad()
def test_features_live_with_the_cache(llama):
    x, kept = ids(1, 20), []

    class Peeks(Method):
        def attend(self, call, inner):
            out = inner(call)
            kept.append(call.m)
            return out

    with regard.patch(llama, Peeks(), SMALL):
        first = llama(x, use_cache=True)
        llama(x[:, :7], use_cache=True)  # another cache in between
        a = llama(x[:, :1], past_key_values=first.past_key_values).logits
        b = llama(torch.cat([x, x[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(a, b, **TOLERANCE)
    # The inner method is called only while nothing is selected.
    assert kept == [7, 7]


def test_the_layer_state_is_small():
    q, k, v = (torch.randn(1, 2, 41, 4) for _ in range(3))
    state = ChunkFeatures(8)
    state.update(q, k, v, partial(rope, base=10.0))
    assert state.features.shape == (1, 2, 5, 4)
    assert [x.shape[2] for x in state._running] == [1, 1, 1]


@torch.no_grad()
def test_what_it_refuses(llama):
    x = ids(1, 30)
    cache = llama(x, use_cache=True).past_key_values
    with regard.patch(llama, SMALL), pytest.raises(ValueError, match="positions of 0 of 31 keys"):
        llama(x[:, :1], past_key_values=cache)
    with (
        regard.patch(llama, Causal() & SlidingWindow(5), SMALL),
        pytest.raises(ValueError, match="layer 0 has another mask"),
    ):
        llama(x)
    scores = Edit("logits", lambda x, site: x * 2)

    class Doubles(Method):
        def edits(self):
            return (scores,)

    with (
        regard.patch(llama, Doubles(), SMALL),
        pytest.raises(ValueError, match="layer 0 has edits of its weights"),
    ):
        llama(x)
    with (
        regard.patch(llama, SMALL),
        pytest.raises(ValueError, match="have gaps, expected consecutive"),
    ):
        llama(x, position_ids=2 * torch.arange(30)[None])
    holes = torch.ones(1, 30, dtype=torch.int64)
    holes[0, 10] = 0
    with regard.patch(llama, SMALL), pytest.raises(ValueError, match="another mask"):
        llama(x, attention_mask=holes)
    mistral = make("mistral")
    with regard.patch(mistral, SMALL), pytest.raises(ValueError, match="expected causal attention"):
        mistral(x)
    with pytest.raises(ValueError, match="a multiple of window"):
        LongHeads(5, 16, 16)


@torch.no_grad()
def test_right_padding_is_never_seen(llama):
    x, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[1, 25:] = 0
    with regard.patch(llama, SMALL):
        padded, plain = llama(x, attention_mask=mask).logits, llama(x).logits
    torch.testing.assert_close(padded[0], plain[0], **TOLERANCE)
    torch.testing.assert_close(padded[1, :25], plain[1, :25], **TOLERANCE)
