"""HyperAttention in running models: exact where it must be, padded as not, cached steps dense."""

from __future__ import annotations

import pytest
import torch
from tests.models.tiny import ids, left_padding, make

import regard
from regard import Causal, Sinks
from regard.models import Edit, Method
from regard.sparse.hyper import hyper_attention
from regard.sparse.hyper_method import HyperAttention

TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}
SMALL = HyperAttention(block=4, samples=4, min_len=8)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_neox"])
@torch.no_grad()
def test_long_pieces_are_exact_and_leaving_restores(kind):
    model, x = make(kind), ids(2, 40)
    dense = model(x).logits
    for method in (HyperAttention(), HyperAttention(block=64, min_len=5)):
        with regard.patch(model, method):
            torch.testing.assert_close(model(x).logits, dense, **TOLERANCE)
    with regard.patch(model, SMALL):
        assert not torch.allclose(model(x).logits, dense, atol=1e-2)
    assert torch.equal(model(x).logits, dense)


@torch.no_grad()
def test_a_layer_computes_hyper_attention():
    model, x = make("llama"), ids(2, 37)
    seen = []

    class Outside(Method):
        def attend(self, call, inner):
            out = inner(call)
            seen.append((call, out))
            return out

    with regard.patch(model, SMALL, Outside()):
        model(x)
    assert len(seen) == 4
    for call, out in seen:
        for entry in range(2):
            one = slice(entry, entry + 1)
            generator = torch.Generator().manual_seed(call.layer)
            want = hyper_attention(
                call.q[one],
                call.k[one],
                call.v[one],
                block=4,
                samples=4,
                min_len=8,
                causal=True,
                generator=generator,
            )
            torch.testing.assert_close(out[one], want)
    # Every layer has directions and samples of its own.
    first, second = (HyperAttention(4, 4, min_len=8, seed=s) for s in (0, 1))
    with regard.patch(model, first):
        a = model(x).logits
        assert torch.equal(a, model(x).logits)
    with regard.patch(model, second):
        assert not torch.allclose(a, model(x).logits, atol=1e-2)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing():
    model, x, left = make("llama"), ids(3, 40), left_padding(3, 40, 9)
    with regard.patch(model, SMALL):
        for mask in (left, left.flip(-1)):
            both = model(x, attention_mask=mask, position_ids=positions(mask)).logits
            for entry in range(3):
                real = mask[entry].bool()
                alone = model(x[entry : entry + 1, real]).logits
                torch.testing.assert_close(both[entry : entry + 1, real], alone, **TOLERANCE)
            assert bool(torch.isfinite(both).all())


@torch.no_grad()
def test_decoding_is_dense_over_the_cache_that_prefill_made():
    model, x = make("llama"), ids(1, 33)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with regard.patch(model, SMALL):
        out = model(x, use_cache=True)
        cache, token, found = out.past_key_values, out.logits[:, -1:].argmax(-1), []
        generated = model.generate(x, **how)
    # The same steps by the bare model over the same cache.
    for _ in range(6):
        found.append(token)
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert torch.equal(torch.cat(found, 1), generated[:, 33:])


@torch.no_grad()
def test_layers_can_be_chosen_and_windows_of_their_own_are_left_alone():
    model, x = make("gemma3"), ids(1, 40)
    seen = []

    class Outside(Method):
        def attend(self, call, inner):
            out = inner(call)
            dense = regard.attend(call.q, call.k, call.v, mask=call.mask, scale=call.scale)
            seen.append(torch.allclose(out, dense, atol=1e-4))
            return out

    with regard.patch(model, SMALL, Outside()):
        model(x)
    windows = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert seen == windows and True in seen and False in seen


@pytest.mark.parametrize(
    ("kind", "others", "words"),
    [
        ("gemma2", (), "soft-capped scores"),
        ("gpt_oss", (), "attention sinks"),
        ("bert", (), "another mask"),
        ("llama", (Causal() & Sinks(4),), "another mask"),
    ],
)
@torch.no_grad()
def test_what_it_cannot_estimate_is_refused(kind, others, words):
    model, x = make(kind, implementation="eager"), ids(1, 20)
    with (
        regard.patch(model, SMALL, *others),
        pytest.raises(ValueError, match=f"HyperAttention: layer . has {words}"),
    ):
        model(x)


@torch.no_grad()
def test_edits_of_weights_and_gaps_in_the_padding_are_refused():
    model, x = make("llama"), ids(1, 20)

    class Halves(Method):
        def edits(self):
            return [Edit("weights", lambda y, at: y / 2)]

    with (
        regard.patch(model, SMALL, Halves()),
        pytest.raises(ValueError, match="edits of its weights"),
    ):
        model(x)
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, 7] = 0
    with regard.patch(model, SMALL), pytest.raises(ValueError, match="another mask"):
        model(x, attention_mask=mask)
