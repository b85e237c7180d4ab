"""AGLA's second branch: its cache goes where the model's goes, against passes without a cache."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tests.models.tiny import ids, left_padding, make
from transformers import DynamicCache, LogitsProcessor, StaticCache

import regard
from regard.steer.agla import AGLA, assemble_logits

# No end token: generate forbids it before the processor runs, by a logit that the definition has not.
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def by_hand(model, x, masked, alpha, beta, steps, mask=None):
    """Greedy tokens and their scores, every step two passes without a cache."""
    scores = []
    x = x.clone()
    short, hidden = masked["input_ids"].clone(), masked.get("attention_mask")
    for _ in range(steps):
        place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        plain = model(x, attention_mask=mask, position_ids=place).logits[:, -1]
        aug = model(short, attention_mask=hidden).logits[:, -1]
        scores.append(assemble_logits(plain, aug, alpha, beta))
        new = scores[-1].argmax(-1, keepdim=True)
        x, short = torch.cat([x, new], 1), torch.cat([short, new], 1)
        one = torch.ones_like(new)
        mask = None if mask is None else torch.cat([mask, one], 1)
        hidden = None if hidden is None else torch.cat([hidden, one], 1)
    return x, scores


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("how", ["hidden", "deleted"])
def test_both_caches_follow_the_chosen_tokens(kind, how):
    model, x = make(kind), ids(2, 14)
    masked = {"input_ids": x[:, 5:]}
    if how == "hidden":
        hole = torch.ones_like(x)
        hole[0, 3:6], hole[1, 4:9] = 0, 0
        masked = {"input_ids": x, "attention_mask": hole}
    want, scores = by_hand(model, x, masked, 2.0, 0.1, 4)
    with regard.patch(model, AGLA(model, masked, 2.0, 0.1)):
        for _ in range(2):  # the same prompt may be begun again
            out = model.generate(x, output_scores=True, return_dict_in_generate=True, **GREEDY)
            assert torch.equal(out.sequences, want)
            for got, one in zip(out.scores, scores, strict=True):
                torch.testing.assert_close(got, one, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model.generate(x, **GREEDY), want)


@torch.no_grad()
def test_rows_of_a_pass_crops_and_copies():
    """Of the prompt the last row changes only, then every row; the branch goes where the cache goes."""
    model, x = make("llama"), ids(2, 14)
    plain, close = model(x).logits, {"atol": 1e-4, "rtol": 1e-4}
    # The branch's prompt lacks two tokens; what follows the prompt is the same.
    want = plain + model(torch.cat([x[:, :3], x[:, 5:]], 1)).logits[:, [0] * 2 + [*range(12)]]
    masked = torch.cat([x[:, :3], x[:, 5:10]], 1)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=20)):
        with regard.patch(model, AGLA(model, masked, 1.0, 0.0)):
            first = model(x[:, :10], past_key_values=cache).logits
            torch.testing.assert_close(first[:, :9], plain[:, :9], **close)
            torch.testing.assert_close(first[:, 9], want[:, 9], **close)
            more = model(x[:, 10:], past_key_values=cache).logits
            torch.testing.assert_close(more, want[:, 10:], **close)
            if isinstance(cache, DynamicCache):
                cache.crop(-3)
                copies = [regard.models.fork(model, cache), deepcopy(cache), cache]
                for copy in copies:
                    again = model(x[:, 11:], past_key_values=copy).logits
                    torch.testing.assert_close(again, want[:, 11:], **close)
            cache.reset()
            assert torch.equal(model(x[:, :10], past_key_values=cache).logits, first)


class Uncached(LogitsProcessor):
    """What beam search should be told, from two passes over everything."""

    def __init__(self, model, masked, mask):
        self.model, self.masked, self.mask = model, masked, mask

    def __call__(self, tokens, scores):
        each = tokens.shape[0] // self.masked.shape[0]
        new = tokens[:, self.masked.shape[1] :]
        short = torch.cat([self.masked.repeat_interleave(each, 0), new], 1)
        hidden = self.mask.repeat_interleave(each, 0)
        hidden = torch.cat([hidden, torch.ones_like(new)], 1)
        plain = self.model(tokens, use_cache=False).logits[:, -1]
        places = (hidden.cumsum(-1) - 1).clamp(min=0)
        aug = self.model(short, attention_mask=hidden, position_ids=places).logits[:, -1]
        return assemble_logits(plain, aug, 1.0, 0.0).log_softmax(-1)


@torch.no_grad()
def test_beams_and_drafts():
    """Beams against the same search without any cache, and drafts against none."""
    model, x = make("llama"), ids(2, 10)
    hidden = left_padding(2, 10, 3)  # padding of the branch alone: rows that differ
    places = (hidden.cumsum(-1) - 1).clamp(min=0)
    masked = {"input_ids": x, "attention_mask": hidden, "position_ids": places}
    beams = {"max_new_tokens": 8, "num_beams": 6, "num_return_sequences": 6, "eos_token_id": None}
    one, reordered, reorder = AGLA(model, x[:1, 4:], 1.0, 0.1), [], DynamicCache.reorder_cache

    def count(cache, order):
        reordered.append(order.tolist() != list(range(len(order))))
        return reorder(cache, order)

    with (
        pytest.MonkeyPatch.context() as patched,
        regard.patch(model, AGLA(model, masked, 1.0, 0.0)),
    ):
        patched.setattr(DynamicCache, "reorder_cache", count)
        got = model.generate(x, **beams)
    assert any(reordered), "no beam overtook another: the test shows nothing"
    want = model.generate(x, logits_processor=[Uncached(model, x, hidden)], **beams)
    assert torch.equal(got, want)
    assert not torch.equal(got, model.generate(x, **beams))
    with regard.patch(model, one):
        slow = model.generate(x[:1], **GREEDY)
        assert torch.equal(model.generate(x[:1], prompt_lookup_num_tokens=3, **GREEDY), slow)


@torch.no_grad()
def test_sequences_change_places():
    model, x = make("llama"), ids(2, 14)
    mask = left_padding(2, 14, 3)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": x, "attention_mask": mask, "position_ids": places}
    # A cache that was repeated has no positions of its own for each row: the model's count.
    plain = {"input_ids": x, "attention_mask": mask}
    changes = [
        (given, [1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
        (given, [1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        (plain, [0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2)),
    ]
    for masked, order, change in changes:
        want = model(x).logits + model(**masked).logits
        method = AGLA(model, {name: part[:, :10] for name, part in masked.items()}, 1.0, 0.0)
        with regard.patch(model, method):
            cache = model(x[:, :10]).past_key_values
            change(cache)
            for part in (slice(10, 11), slice(11, 14)):
                got = model(x[order, part], past_key_values=cache).logits
                torch.testing.assert_close(got, want[order, part], atol=1e-4, rtol=1e-4)
