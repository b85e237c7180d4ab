"""PINE where positions have three axes: text documents before and behind an image (Qwen2-VL)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.golden.pine import rotate
from tests.steer import moving
from tests.steer.test_pine import tensors, written_out
from tests.steer.tiny_vlm import IMAGE, qwen2_5_vl, qwen2_vl

import regard
from regard.models import Spans
from regard.steer.pine import PINE, PineLayout, pine_attention


def rope_of_three(x, positions):
    """M-RoPE with sections 1, 1, 2: every pair of channels is turned by the axis of its section."""
    turned = [rotate(x, positions[axis], base=100.0) for axis in (0, 1, 2, 2)]
    return torch.stack([turned[c % 4][..., c] for c in range(8)], -1)


def test_on_three_axes_it_is_the_loop_written_out():
    """Images of 2 x 2 tokens before and behind the documents, which keep their rows and columns."""
    layout = PineLayout(5, (2, 1, 3), 6)
    q, k, v = tensors(layout)
    image = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    text = torch.arange(7).expand(3, -1) + 3
    places = torch.cat([torch.zeros(3, 1, dtype=torch.int64), image + 1, text, image + 10], 1)
    places = torch.cat([places, torch.full((3, 1), 12)], 1)
    assert places.shape == (3, layout.length)
    want = written_out(q, k, v, layout, rope_of_three, places)
    got = pine_attention(q, k, v, layout, rope_of_three, places=places[:, None])
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    last = pine_attention(q[:, :, -6:], k, v, layout, rope_of_three, places=places[:, None])
    torch.testing.assert_close(last, want[:, :, -6:], atol=1e-10, rtol=1e-10)
    assert (pine_attention(q, k, v, layout, partial(rotate, base=100.0)) - got).abs().max() > 1e-2


def beside_an_image(build, before):
    """A prompt of three documents (4, 2 and 3 tokens) and an image, in two orders; their spans."""
    model, inputs, _ = build()
    image = inputs["input_ids"][:, 2:20]
    parts = [torch.tensor([t]) for t in ([11, 12, 13, 14], [21, 22], [31, 32, 33])]
    start, end = torch.tensor([[1, 5]]), torch.tensor([[7, 8, 9]])
    prompts = []
    for order in ((0, 1, 2), (2, 0, 1)):
        docs = [parts[at] for at in order]
        mid = [image, *docs] if before else [*docs, image]
        x, edge, ranges = torch.cat([start, *mid, end], 1), 20 if before else 2, []
        for doc in docs:
            ranges.append((edge, edge + doc.shape[1]))
            edge += doc.shape[1]
        types = (x == IMAGE).int()
        given = {**inputs, "input_ids": x, "mm_token_type_ids": types}
        prompts.append((given, Spans.of(x.shape[1], documents=ranges)))
    return model, prompts


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("build", [qwen2_vl, qwen2_5_vl])
def test_beside_an_image_of_three_axes(build, before):
    """Text documents of a model with an image before or behind them: their order has no effect."""
    model, ((one, spans), (other, moved)) = beside_an_image(build, before)
    behind = spans.ranges["documents"][-1][1]
    plain = model(**one).logits
    assert (plain - model(**other).logits)[:, behind:].abs().max() > 1e-2
    with regard.patch(model, PINE(), spans=spans):
        first = model(**one).logits
        tokens = model.generate(**one, **moving.GREEDY)
    with regard.patch(model, PINE(), spans=moved):
        second = model(**other).logits
        assert torch.equal(model.generate(**other, **moving.GREEDY)[:, 29:], tokens[:, 29:])
    torch.testing.assert_close(second[:, behind:], first[:, behind:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first[:, : behind - 9], plain[:, : behind - 9], atol=1e-5, rtol=1e-5)
    assert (first - plain)[:, behind - 9 :].abs().amax((0, 2)).min() > 1e-4
    # One document changes nothing; leaving restores the model.
    whole = Spans.of(32, documents=[(behind - 9, behind)])
    with regard.patch(model, PINE(), spans=whole):
        torch.testing.assert_close(model(**one).logits, plain, atol=1e-6, rtol=1e-6)
    assert torch.equal(model(**one).logits, plain)


@torch.no_grad()
def test_decoding_behind_an_image_of_three_axes():
    model, ((inputs, spans), _) = beside_an_image(qwen2_vl, True)
    moving.steps_behind_an_image_are_one_pass(model, inputs, spans, PINE())


@torch.no_grad()
def test_padding_before_an_image_of_three_axes():
    """A batch of two, the second one with two padded tokens in front, answers as each alone does."""
    model, ((inputs, spans), _) = beside_an_image(qwen2_vl, True)
    x = inputs["input_ids"]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), x[:, 2:]], 1)
    both = {
        "input_ids": torch.cat([x, padded]),
        "attention_mask": torch.cat([x, padded]).ne(0).long(),
        "pixel_values": inputs["pixel_values"].repeat(2, 1),
        "image_grid_thw": inputs["image_grid_thw"].repeat(2, 1),
        "mm_token_type_ids": (torch.cat([x, padded]) == IMAGE).int(),
    }
    alone = {
        **inputs,
        "input_ids": x[:, 2:],
        "mm_token_type_ids": inputs["mm_token_type_ids"][:, 2:],
    }
    long = {**moving.GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with regard.patch(model, PINE(), spans=spans):
        got = model.generate(**both, **long)
        wants = [model.generate(**inputs, **long)]
    with regard.patch(model, PINE(), spans=moving.shifted(spans, 2)):
        wants.append(model.generate(**alone, **long))
    for entry, want in enumerate(wants):
        assert torch.equal(got.sequences[entry, -4:], want.sequences[0, -4:])
        for a, b in zip(want.logits, got.logits, strict=True):
            torch.testing.assert_close(a[0], b[entry], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_document_with_an_image_is_refused():
    model, inputs, _ = qwen2_vl()
    plain = model(**inputs).logits
    # The first token of an image stands where a token of text would.
    for documents, column in (
        ([(3, 11), (11, 19)], 4),
        ([(1, 2), (2, 6)], 4),
        ([(1, 2), (2, 4)], None),
    ):
        with regard.patch(model, PINE(), spans=Spans.of(24, documents=documents)):
            if column is None:
                assert (model(**inputs).logits - plain).abs().max() > 1e-3
                continue
            with pytest.raises(
                ValueError, match=rf"column {column} .*leave images before or behind"
            ):
                model(**inputs)
    # A gap in the positions of text is no text either.
    places = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10]).expand(3, 1, -1)
    x, mask = torch.arange(8)[None] + 3, torch.ones(1, 8, dtype=torch.int64)
    with (
        regard.patch(model, PINE(), spans=Spans.of(8, documents=[(1, 3), (3, 6)])),
        pytest.raises(ValueError, match=r"column 4 .*\[7, 7, 7\]"),
    ):
        model(x, position_ids=places, attention_mask=mask)
    assert torch.equal(model(**inputs).logits, plain)
