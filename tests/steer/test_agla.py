"""AGLA against its formulas written out, limits, and its second branch against plain passes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from benchmarks import agla as benchmark
from tests.golden import adapter, load
from tests.models.tiny import ids, left_padding, make
from tests.steer.tiny_vlm import VLMS
from transformers import DynamicCache

import regard
from regard.steer.agla import AGLA, assemble_logits, keep_most_relevant, relevance_mask

DATA = Path(__file__).parents[1] / "golden" / "data"
# No end token: generate forbids it before the processor runs, by a logit that the definition has not.
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


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
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
