"""AGLA against its formulas written out, limits, and its second branch against plain passes."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from benchmarks import agla as benchmark
from tests.golden import adapter, load
from tests.models.tiny import ids, left_padding, make
from tests.steer.tiny_vlm import VLMS
from transformers import DynamicCache, LogitsProcessor, StaticCache

import regard
from regard.models import Spans, capture
from regard.steer.agla import AGLA, assemble_logits, keep_most_relevant, relevance_mask
from regard.steer.agla_text import mask_context, text_relevance

DATA = Path(__file__).parents[1] / "golden" / "data"
# No end token: generate forbids it before the processor runs, by a logit that the definition has not.
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
SPANS = Spans.of(14, image=(2, 9), text=(10, 14))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_the_formula_written_out():
    logits, other = normal(3, 9), normal(3, 9, seed=1)
    got = assemble_logits(logits, other, 2.0, 0.4)
    for row, aug, new in zip(logits.tolist(), other.tolist(), got.tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        p = [math.exp(x) / total for x in row]
        want = [
            a + 2.0 * b if q >= 0.4 * max(p) else -math.inf
            for a, b, q in zip(row, aug, p, strict=True)
        ]
        assert new == pytest.approx(want)
    assert torch.isinf(got).any() and not torch.isinf(got).all(-1).any()


def test_limits():
    logits, other = normal(5, 30), normal(5, 30, seed=1)
    assert torch.equal(assemble_logits(logits, other, 0.0, 0.0), logits)
    forbidden = torch.full_like(other, -torch.inf)
    assert torch.equal(assemble_logits(logits, forbidden, 0.0, 0.0), logits)
    for beta in (0.01, 0.5, 1.0):
        got = assemble_logits(logits, other, 2.0, beta)
        assert torch.isfinite(got.gather(-1, logits.argmax(-1, keepdim=True))).all()
    assert torch.equal(torch.isfinite(got).sum(-1), torch.ones(5, dtype=torch.int64))
    # A good match leaves less of the image.
    cam = normal(12, 12)
    kept = [int(relevance_mask(cam, s).sum()) for s in (0.0, 0.4, 1.0, 1.6, 2.0)]
    assert kept == [144, 116, 73, 29, 1]
    assert relevance_mask(cam, -1.0).all()
    assert keep_most_relevant(torch.zeros(7), 0.2).all()


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
def test_alpha_zero_is_greedy_and_leaves_the_model():
    model, x = make("llama"), ids(2, 14)
    before, plain = model(x).logits, model.generate(x, **GREEDY)
    for beta in (0.0, 0.5, 1.0):
        with regard.patch(model, AGLA(model, x[:, 4:], 0.0, beta)):
            assert torch.equal(model.generate(x, **GREEDY), plain)
    only = AGLA(model, x[:, 4:], 9.0, 1.0)  # the cut leaves the argmax alone
    with regard.patch(model, only):
        assert torch.equal(model.generate(x, **GREEDY), plain)
    assert torch.equal(model(x).logits, before)
    with pytest.raises(RuntimeError, match="in the middle"), regard.patch(model, only):
        model(x)
        raise RuntimeError("in the middle")
    assert torch.equal(model(x).logits, before)


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


@torch.no_grad()
def test_other_patches_act_on_both_branches():
    model, x = make("llama"), ids(2, 14)
    heads = regard.models.HeadMask([(0, 1), (2, 3)])
    with regard.patch(model, heads):
        want = model(x).logits[:, -1] + model(x[:, 4:]).logits[:, -1]
    method = AGLA(model, x[:, 4:], 1.0, 0.0)
    for order in ((heads, method), (method, heads)):
        with regard.patch(model, *order):
            torch.testing.assert_close(model(x).logits[:, -1], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_left_padding():
    model, x = make("llama"), ids(2, 14)
    mask = left_padding(2, 14, 3)
    masked = {
        "input_ids": x,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    with regard.patch(model, AGLA(model, masked, 1.0, 0.2)):
        both = model.generate(x, attention_mask=mask, **GREEDY)
    with regard.patch(model, AGLA(model, x[1:, 3:], 1.0, 0.2)):
        want = model.generate(x[1:, 3:], **GREEDY)
    assert torch.equal(both[1, 3:], want[0])


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(VLMS))
def test_on_images(name):
    model, inputs, _ = VLMS[name]()
    pixels = inputs["pixel_values"]
    black = {**inputs, "pixel_values": pixels * relevance_mask(pixels[..., :1], 0.8)}
    told = {"output_scores": True, "return_dict_in_generate": True}
    with regard.patch(model, AGLA(model, black, 3.0, 0.01)):
        out = model.generate(**inputs, **told, **GREEDY)
    whole = inputs["input_ids"]
    for step, got in enumerate(out.scores):  # every step against two passes without a cache
        tail = out.sequences[:, whole.shape[1] : whole.shape[1] + step]
        extra = {"input_ids": torch.cat([whole, tail], 1)}
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            extra["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tail).int()], 1)
        plain, aug = (model(**{**x, **extra}).logits[:, -1] for x in (inputs, black))
        want = assemble_logits(plain, aug, 3.0, 0.01)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not torch.equal(plain, aug)


@torch.no_grad()
def test_branch_without_the_image():
    """Qwen-VL counts an image's positions by its grid, and keeps that shift on the model."""
    model, inputs, _ = VLMS["qwen2_vl"]()
    whole, close = inputs["input_ids"], {"atol": 1e-4, "rtol": 1e-4}
    text = whole[:, -4:]
    with regard.patch(model, AGLA(model, text, 3.0, 0.0)):
        told = {"output_scores": True, "return_dict_in_generate": True}
        out = model.generate(**inputs, **told, **GREEDY)
    for step, got in enumerate(out.scores):
        tail = out.sequences[:, whole.shape[1] : whole.shape[1] + step]
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail).int()], 1)
        full = {**inputs, "input_ids": torch.cat([whole, tail], 1), "mm_token_type_ids": kinds}
        aug = model(input_ids=torch.cat([text, tail], 1)).logits[:, -1]
        want = assemble_logits(model(**full).logits[:, -1], aug, 3.0, 0.0)
        torch.testing.assert_close(got, want, **close)
    model(**inputs)
    shift = model.model.rope_deltas
    with regard.patch(model, AGLA(model, text)):
        model(**inputs)
        assert shift.any() and torch.equal(model.model.rope_deltas, shift)


def test_relevance_is_gradient_times_attention():
    # GPT-NeoX alone: Llama's norms run in float32, too coarse for differences.
    model, x = make("gpt_neox").double(), ids(2, 14)
    spans = Spans.of(14, image=(2, 9), text=(12, 14))
    found = text_relevance(model, x, spans, layers=[2])
    assert found.shape == (2, 7) and (found >= 0).all() and found.any()
    assert all(p.grad is None for p in model.parameters())
    weights = capture(model, x, "weights", layers=[2])
    total = _slopes(model, x, 2, weights["weights", 2])
    torch.testing.assert_close(found, total / 2, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def _slopes(model, x, layer, weights, step=1e-5):
    """The same by differences: every weight of the question's rows moved on its own."""
    total = torch.zeros(2, 7, dtype=torch.float64)
    for head in range(4):
        for row in range(12, 14):
            for key in range(2, 9):
                ends = []
                for sign in (1, -1):

                    def nudge(w, site, row=row, key=key, sign=sign):
                        w = w.clone()
                        w[:, 0, row, key] += sign * step
                        return w

                    edit = regard.models.Edit("weights", nudge, layers=[layer], heads=[head])
                    with regard.patch(model, _Edits(edit)):
                        told = model(x).logits[:, 11:13].log_softmax(-1)
                    ends.append(told.gather(-1, x[:, 12:14, None]).sum((1, 2)))
                slope = (ends[0] - ends[1]) / (2 * step)
                total[:, key - 2] += slope.clamp(min=0) * weights[:, head, row, key] / 4
    return total


class _Edits(regard.models.Method):
    def __init__(self, *edits):
        self._edits = edits

    def edits(self):
        return self._edits


def test_mask_hides_the_rest_of_the_context():
    x = ids(2, 14)
    relevance = torch.stack([torch.arange(7.0), torch.arange(7.0).flip(0)])
    mask = mask_context(x, relevance, SPANS, 1 / 3)
    assert mask[:, :2].all() and mask[:, 9:].all()
    assert mask[:, 2:9].tolist() == [[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]


def test_golden_replays_at_other_sizes():
    case = load(DATA / "agla.npz")
    cut = {**case, **{k: case[k][:2] for k in ("logits", "logits_aug", "out")}}
    got = adapter(DATA / "agla.npz").replay(cut)
    torch.testing.assert_close(torch.tensor(got["out"]), torch.tensor(cut["out"]))


def test_cost_is_a_second_pass_a_token():
    assert "2.00 tokens" in benchmark.growth((2, 4, 8))[0]["note"]


def running(x, patched=None, before=0, **options):
    model, cache = make("llama"), DynamicCache()
    if before:
        model(ids(2, before), past_key_values=cache)
        options["past_key_values"] = cache
    with regard.patch(patched or model, AGLA(model, ids(2, 8))):
        (patched or model)(x, **options)


def embedded():
    model, x = make("llama"), ids(2, 8)
    with regard.patch(model, AGLA(model, x)):
        cache = model(x).past_key_values
        model(inputs_embeds=torch.zeros(2, 1, 32), past_key_values=cache)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: running(ids(3, 8)), "masked holds 2 sequences, the model runs 3"),
        (lambda: running(ids(2, 8), use_cache=False), "follows the KV cache"),
        (lambda: running(ids(2, 1), before=5), "holds 5 tokens that the second branch has not"),
        (lambda: running(ids(2, 8), make("llama")), "another one than the patched model"),
        (embedded, "give the chosen tokens as input_ids"),
        (lambda: AGLA(make("llama"), {"pixel_values": 0}), "masked needs input_ids"),
        (lambda: AGLA(make("llama"), ids(1, 3), beta=2.0), "beta must lie in"),
        (lambda: mask_context(ids(1, 14), torch.ones(1, 3), SPANS, 0.3), r"must be \(1, 7\)"),
        (
            lambda: text_relevance(
                make("llama"), ids(1, 8), Spans.of(8, image=(4, 8), text=(0, 4))
            ),
            "must stand before",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
