"""What every method that moves attention towards a span must pass, as checks for its own tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.tiny import ids, left_padding, make
from tests.steer.tiny_vlm import IMAGE
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import regard
from regard.models import Method, SiteProbe, Spans, capture

TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}
# Of ids(2, 18): a prompt of 14 tokens, the image inside, the question at its end but for one token.
SPANS = Spans.of(14, image=[(2, 5), (6, 8)], text=(9, 13))
PROMPT, ALL = 14, 18
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def shifted(spans: Spans, by: int) -> Spans:
    """The spans of the same prompt without `by` tokens in front."""
    ranges = {n: tuple((a - by, z - by) for a, z in r) for n, r in spans.ranges.items()}
    return Spans(ranges, spans.length - by)


@torch.no_grad()
def changes_nothing(
    method: Method, kinds: tuple[str, ...] = ("llama", "qwen3", "gpt_neox")
) -> None:
    """Identity parameters leave the logits as they are, and the tokens that are generated."""
    for kind in kinds:
        model, x = make(kind), ids(2, ALL)
        plain, tokens = model(x).logits, model.generate(x[:, :PROMPT], **GREEDY)
        with regard.patch(model, method, spans=SPANS):
            got = model(x).logits
            assert torch.equal(model.generate(x[:, :PROMPT], **GREEDY), tokens), kind
        assert float((got - plain).abs().max()) < 1e-6 * max(1.0, float(plain.abs().max())), kind


@torch.no_grad()
def changes_something(method: Method, kind: str = "llama") -> Tensor:
    """What the method changes in the logits, `(2, 18, V)`, which is not nothing."""
    model, x = make(kind), ids(2, ALL)
    plain = model(x).logits
    with regard.patch(model, method, spans=SPANS):
        change = model(x).logits - plain
    assert float(change.abs().max()) > 1e-3
    return change


@torch.no_grad()
def cached_is_uncached(method: Method, kinds: tuple[str, ...] = ("llama", "gpt_neox")) -> None:
    """Prompt and steps over a cache give what one pass over everything gives."""
    for kind in kinds:
        model, x = make(kind), ids(2, ALL)
        with regard.patch(model, method, spans=SPANS):
            whole = model(x).logits
            out = model(x[:, :PROMPT], use_cache=True)
            steps = [out.logits]
            for t in range(PROMPT, ALL):
                cache = out.past_key_values
                steps.append(model(x[:, t : t + 1], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, **TOLERANCE)


@torch.no_grad()
def pieces_are_the_whole(method: Method, kind: str = "llama") -> None:
    """A prompt read in pieces gives what one pass gives."""
    model, x = make(kind), ids(2, ALL)
    with regard.patch(model, method, spans=SPANS):
        whole = model(x).logits
        cache, parts = None, []
        for part in (x[:, :4], x[:, 4:11], x[:, 11:PROMPT], x[:, PROMPT:]):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)


@torch.no_grad()
def padding_does_not_matter(make_method: Any, kind: str = "llama") -> None:
    """Two sequences, one with two padded tokens in front, answer as each alone does."""
    model, x, mask = make(kind), ids(2, PROMPT), left_padding(2, PROMPT, 2)
    long = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with regard.patch(model, make_method(), spans=SPANS):
        both = model.generate(x, attention_mask=mask, **long)
    plain = model.generate(x, attention_mask=mask, **long)
    assert not torch.allclose(both.logits[-1], plain.logits[-1], atol=1e-3)
    for entry, gone in ((0, 0), (1, 2)):
        with regard.patch(model, make_method(), spans=shifted(SPANS, gone)):
            alone = model.generate(x[entry : entry + 1, gone:], **long)
        assert torch.equal(alone.sequences[0, -4:], both.sequences[entry, -4:])
        for a, b in zip(alone.logits, both.logits, strict=True):
            torch.testing.assert_close(a[0], b[entry], **TOLERANCE)


@torch.no_grad()
def beams_are_those_of_a_slow_search(method: Method) -> None:
    """Beam search over the cache, which reorders its entries, finds what it finds without a cache."""
    model, x = make("llama"), ids(2, PROMPT)
    beams = {**GREEDY, "num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    with regard.patch(model, method, spans=SPANS):
        fast = model.generate(x, **beams)
        slow = model.generate(x, use_cache=False, **beams)
    assert torch.equal(fast, slow)


class _Fails(LogitsProcessor):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("in the middle")
        return scores


@torch.no_grad()
def leaves_the_model_as_it_was(method: Method) -> None:
    """Bit for bit, after the block and after an exception in the middle of `generate`."""
    model, x = make("llama"), ids(2, PROMPT)
    before = model(x).logits
    with regard.patch(model, method, spans=SPANS):
        first = model(x).logits
    assert torch.equal(model(x).logits, before)
    processors = LogitsProcessorList([_Fails()])
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        regard.patch(model, method, spans=SPANS),
    ):
        model.generate(x, logits_processor=processors, **GREEDY)
    assert torch.equal(model(x).logits, before)
    with regard.patch(model, method, spans=SPANS):
        assert torch.equal(model(x).logits, first)  # no state of the last run


@torch.no_grad()
def weights_of(method: Method, kind: str = "llama") -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Weights by layer of one pass over prompt and answer, as they are and steered; sums are 1."""
    model, x = make(kind), ids(2, ALL)
    plain = capture(model, x, "weights")
    with (
        regard.patch(model, method, spans=SPANS),
        regard.watch(model, SiteProbe("weights")) as seen,
    ):
        model(x)
    steered = seen.result()[0]
    for layer, w in steered.items():
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w.sum(-1)), atol=1e-5, rtol=0)
        assert (w >= 0).all() and not w.triu(1).any(), layer
    return {layer: plain["weights", layer] for layer in steered}, steered


@torch.no_grad()
def needs_its_span(method: Method, name: str) -> None:
    """Without the span, the error names it and says how to declare it."""
    model, x = make("llama"), ids(1, PROMPT)
    with regard.patch(model, method), pytest.raises(ValueError, match=r"patch\(\.\.\., spans="):
        model(x)
    others = Spans.of(14, other=(0, 3))
    with regard.patch(model, method, spans=others), pytest.raises(ValueError, match=f"'{name}'"):
        model(x)


@torch.no_grad()
def works_on_images(make_method: Any, neutral: Method) -> None:
    """On LLaVA and Qwen2-VL: neutral changes nothing, the method does, and generation is greedy's."""
    from tests.steer.tiny_vlm import VLMS

    for name, build in VLMS.items():
        model, inputs, spans = build()
        plain = model(**inputs).logits
        with regard.patch(model, neutral, spans=spans):
            torch.testing.assert_close(model(**inputs).logits, plain, atol=1e-5, rtol=1e-5)
        method = make_method(model, inputs, spans)
        with regard.patch(model, method, spans=spans):
            steered = model(**inputs).logits
            tokens = model.generate(**inputs, **GREEDY)
        assert float((steered - plain).abs().max()) > 1e-3, name
        steered[0, -1, model.get_decoder().config.eos_token_id] = -torch.inf  # four tokens at least
        assert tokens[0, inputs["input_ids"].shape[1]] == steered[0, -1].argmax(), name
        assert torch.equal(model(**inputs).logits, plain), name


@torch.no_grad()
def steps_behind_an_image_are_one_pass(
    model: Any, inputs: dict[str, Any], spans: Spans, method: Method
) -> None:
    """Three further tokens over the cache of a Qwen2-VL prompt, against one pass over all."""
    answer = torch.tensor([[15, 16, 17]])
    x = torch.cat([inputs["input_ids"], answer], 1)
    longer = {**inputs, "input_ids": x, "mm_token_type_ids": (x == IMAGE).int()}
    with regard.patch(model, method, spans=spans):
        whole = model(**longer).logits
        out = model(**inputs, use_cache=True)
        steps = [out.logits]
        for t in range(3):
            cache = out.past_key_values
            steps.append(model(answer[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **TOLERANCE)
