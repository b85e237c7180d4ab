"""Modality-mutual attention against its mask written out, its leak test, and models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import mma as benchmark
from tests.golden import adapter, load
from tests.models.tiny import ids, make
from tests.steer import moving

import regard
from regard import Causal, Rectangles
from regard.models import SiteProbe, Spans
from regard.steer.mma import ModalityMutual, mutual_mask

DATA = Path(__file__).parents[1] / "golden" / "data"
EMPTY = Spans.of(14, image=(2, 8), text=[])


def written_out(n, image, text, padding):
    allow = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            seen = k <= q or (image[0] <= q < image[1] and text[0] <= k < text[1])
            allow[q, k] = seen and bool(padding[k])
    return allow


@pytest.mark.parametrize("image", [(2, 7), (0, 1), (3, 3)])
@pytest.mark.parametrize("text", [(7, 11), (9, 14), (8, 8)])
def test_is_the_mask_written_out(image, text):
    padding = torch.ones(14, dtype=torch.int64)
    padding[:2] = 0
    want = written_out(14, image, text, padding)
    assert torch.equal(mutual_mask(14, image, text, padding), want)
    batch = torch.stack([padding, torch.ones_like(padding)])
    both = mutual_mask(14, image, text, batch)
    assert torch.equal(both[0], want) and torch.equal(both[1], mutual_mask(14, image, text))
    mask = Causal() | Rectangles((image,), (text,))
    assert mask.closed
    for block in (3, 4, (5, 2)):
        assert torch.equal(mask.layout(14, 14, block).dense()[0, 0], mutual_mask(14, image, text))


def test_limits():
    assert torch.equal(mutual_mask(9, (1, 4), (6, 6)), Causal().dense(9))
    # Two ranges side by side are one.
    one, two = Rectangles(((1, 5),), ((6, 9),)), Rectangles(((1, 3), (3, 5)), ((6, 7), (7, 9)))
    for block in (2, 4):
        a, b = (mask.layout(12, 12, block) for mask in (one, two))
        assert torch.equal(a.dense(), b.dense()) and a.listed_pairs() == b.listed_pairs()


@torch.no_grad()
def test_only_rows_of_the_image_change_and_only_by_the_question():
    model, x = make("llama"), ids(2, 18)
    plain, steered = {}, {}
    for found, method in ((plain, regard.Full()), (steered, ModalityMutual())):
        with (
            regard.patch(model, method, spans=moving.SPANS),
            regard.watch(model, SiteProbe("weights", layers=[0])) as seen,
        ):
            model(x)
        found.update(seen.result()[0])
    image = torch.tensor([2, 3, 4, 6, 7])
    others = torch.tensor([c for c in range(18) if c not in image.tolist()])
    a, b = plain[0], steered[0]
    assert torch.equal(a[:, :, others], b[:, :, others])
    torch.testing.assert_close(b.sum(-1), torch.ones_like(b.sum(-1)), atol=1e-5, rtol=0)
    new = b[:, :, image]
    assert (new[..., 9:13] > 0).all() and not new[..., 13:].any() and not new[..., 8].any()
    # What the rows saw before keeps its proportions.
    old = torch.where(a[:, :, image] > 0, new, 0.0)
    torch.testing.assert_close(old / old.sum(-1, keepdim=True), a[:, :, image])


@torch.no_grad()
def test_the_answer_does_not_leak_into_the_image():
    for kind in ("llama", "gpt_neox"):
        model, x = make(kind), ids(2, 18)
        other = x.clone()
        other[:, 13:] = (x[:, 13:] + 5) % 63 + 1
        question = x.clone()
        question[:, 12] = (x[:, 12] + 5) % 63 + 1
        with regard.patch(model, ModalityMutual(), spans=moving.SPANS):
            before, after, asked = (model(y).logits[:, :13] for y in (x, other, question))
        assert torch.equal(before, after)
        # A later token of the question reaches its earlier tokens through the image.
        assert (before - asked)[:, 2:8].abs().max() > 1e-3
        assert (before - asked)[:, 9:12].abs().max() > 1e-3


def test_moving_checks():
    method = ModalityMutual()
    moving.changes_something(method)
    moving.cached_is_uncached(method)
    moving.padding_does_not_matter(ModalityMutual)
    moving.leaves_the_model_as_it_was(method)
    moving.beams_are_those_of_a_slow_search(method)
    moving.needs_its_span(method, "text")


def test_an_empty_question_changes_nothing(monkeypatch):
    monkeypatch.setattr(moving, "SPANS", EMPTY)
    moving.changes_nothing(ModalityMutual())


@torch.no_grad()
def test_on_images():
    from tests.steer.tiny_vlm import VLMS

    for name, build in VLMS.items():
        model, inputs, spans = build()
        plain = model(**inputs).logits
        no_text = Spans({**spans.ranges, "text": ()}, spans.length)
        with regard.patch(model, ModalityMutual(), spans=no_text):
            torch.testing.assert_close(model(**inputs).logits, plain, atol=1e-6, rtol=1e-6)
        with regard.patch(model, ModalityMutual(), spans=spans):
            steered = model(**inputs).logits
            tokens = model.generate(**inputs, **moving.GREEDY)
        torch.testing.assert_close(steered[:, :3], plain[:, :3], atol=1e-5, rtol=1e-5)
        assert (steered - plain)[:, 3:19].abs().max() > 1e-3, name
        # The end of the text is not to come yet.
        best = steered[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()
        assert tokens[0, inputs["input_ids"].shape[1]] == best, name
        assert torch.equal(model(**inputs).logits, plain), name


@torch.no_grad()
def test_sliding_layers_and_pieces():
    model, x = make("qwen3"), ids(1, 18)
    with (
        regard.patch(model, ModalityMutual(), spans=moving.SPANS),
        regard.watch(model, SiteProbe("weights", layers=[0, 1])) as seen,
    ):
        model(x)
    for weights in seen.result()[0].values():
        assert (weights[:, :, 2:5, 9:13] > 0).all()
    model = make("llama")
    with regard.patch(model, ModalityMutual(), spans=moving.SPANS):
        whole = model(x).logits
        cache = model(x[:, :2], use_cache=True).past_key_values
        rest = model(x[:, 2:], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[:, 2:], **moving.TOLERANCE)
        with pytest.raises(ValueError, match="read both in one pass"):
            model(x[:, :10])


def test_gradients_reach_the_image_from_the_question():
    model, x = make("llama"), ids(1, 14)
    embeds = model.get_input_embeddings()(x).detach().requires_grad_()
    with regard.patch(model, ModalityMutual(), spans=moving.SPANS):
        model(inputs_embeds=embeds).logits[:, 2].sum().backward()
    assert embeds.grad[:, 9:13].abs().min() > 0 and not embeds.grad[:, 13].any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mutual_mask(9, (2, 10), (4, 5)), "image .* does not lie inside 9 tokens"),
        (lambda: mutual_mask(9, (2, 4), (6, 5)), "text .* does not lie inside"),
        (lambda: mutual_mask(9, (2, 4), (5, 7), torch.ones(8)), "padding covers 8 keys"),
        (lambda: Rectangles(((3, 1),), ()), "0 <= start <= stop"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_golden_replays_with_padding():
    case = load(DATA / "mma.npz")
    got = adapter(DATA / "mma.npz").replay(case)["mask"]
    assert (got == case["mask"]).all()
    case["attention_mask"][-2:] = 0
    padded = adapter(DATA / "mma.npz").replay(case)["mask"]
    assert not padded[:, -2:].any() and (padded[:, :-2] == got[:, :-2]).all()


def test_work_grows_as_causal():
    assert "N^2.00" in benchmark.growth((64, 1024))[0]["note"]


@pytest.mark.slow
def test_training_learns():
    for mutual in (False, True):
        before, after = benchmark.accuracy(mutual, steps=250, seed=0)
        assert before < 0.6 and after > 0.8
