"""Composite attention: the fast form against dense attention, its limits, and models."""

from __future__ import annotations

import pytest
import torch
from benchmarks import ee_mllm as benchmark
from tests.models.tiny import ids, make
from tests.steer import moving

import regard
from regard import Causal
from regard.models import Spans, capture
from regard.steer.ee_mllm import (
    EEMLLM,
    CompositeAttention,
    composite_attention,
    composite_mask,
    image_alone,
)

EMPTY = Spans.of(14, image=[], text=(9, 13))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def dense(q, k, v, allow):
    """Softmax attention over allowed pairs, written out; rows without keys are 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allow, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("sees", ["self", "nothing"])
@pytest.mark.parametrize(
    "image", [[(0, 5)], [(3, 9)], [(9, 13)], [(2, 4), (6, 11)], [(2, 4), (4, 9)], [(0, 13)], []]
)
def test_fast_form_is_dense_attention_under_the_mask(image, sees):
    q, k, v = rand(2, 4, 13, 6), rand(2, 2, 13, 6, seed=1), rand(2, 2, 13, 5, seed=2)
    allow = torch.ones(13, 13).tril().bool()
    for a, z in image:
        allow[a:z] = False
        if sees == "self":
            allow[range(a, z), range(a, z)] = True
    got = composite_attention(q, k, v, image, sees)
    torch.testing.assert_close(got, dense(q, k, v, allow), atol=1e-12, rtol=1e-12)
    mask = Causal() & image_alone(tuple(image), sees)
    assert torch.equal(mask.dense(13), allow)
    for block in (2, 4, (3, 5)):
        assert torch.equal(mask.layout(13, 13, block).dense()[0, 0], allow)
    torch.testing.assert_close(regard.attend(q, k, v, mask=mask), got)
    if len(image) == 1:
        assert torch.equal(composite_mask(13, image[0], sees), allow)


def test_limits_are_pytorchs_attention():
    q, k, v = (rand(2, 4, 12, 6, seed=s) for s in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    causal = attention(q, k, v, is_causal=True)
    torch.testing.assert_close(composite_attention(q, k, v, []), causal)
    # One image token sees itself alone, as it would in front of a causal text.
    torch.testing.assert_close(composite_attention(q, k, v, [(0, 1)]), causal)
    got = composite_attention(q, k, v, [(2, 7)])
    torch.testing.assert_close(got[:, :, 7:], causal[:, :, 7:])
    torch.testing.assert_close(got[:, :, :2], causal[:, :, :2])
    assert torch.equal(got[:, :, 2:7], v[:, :, 2:7])


def test_image_rows_have_no_queries():
    q, k, v = (rand(1, 2, 9, 4, seed=s) for s in range(3))
    wrong = q.clone()
    wrong[:, :, 3:7] = torch.nan
    a, b = (composite_attention(x, k, v, [(3, 7)]) for x in (q, wrong))
    assert torch.equal(a, b)


@pytest.mark.parametrize("update", ["self", "mlp", "none"])
def test_the_module_is_its_projections(update):
    torch.manual_seed(0)
    layer = CompositeAttention(16, 4, 2, update).double()
    x = rand(2, 11, 16)
    q, k, v = (
        proj(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    allow = composite_mask(11, (2, 8), "self" if update == "self" else "nothing")
    want = layer.o_proj(dense(q, k, v, allow).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, [(2, 8)]), want)


@torch.no_grad()
def test_updates_of_image_tokens_in_a_model():
    for kind in ("llama", "gpt_neox"):
        model, x = make(kind), ids(2, 18)
        image = torch.tensor([2, 3, 4, 6, 7])
        start = model.get_input_embeddings()(x)[:, image]
        found = {}
        for update in ("self", "mlp", "none"):
            with regard.patch(model, EEMLLM(update), spans=moving.SPANS):
                seen = capture(model, x, "attn", "mlp", "resid")
            found[update] = seen
            assert (seen["attn", 1][:, image] == 0).all() == (update != "self")
            assert (seen["mlp", 1][:, image] == 0).all() == (update == "none")
        # Frozen tokens are what was put in.
        assert torch.equal(found["none"]["resid", 3][:, image], start)
        assert not torch.allclose(found["mlp"]["resid", 3][:, image], start)


@torch.no_grad()
def test_self_is_the_output_projection_of_the_value():
    model, x = make("llama"), ids(2, 18)
    layer = model.model.layers[0]
    with regard.patch(model, EEMLLM(), spans=moving.SPANS):
        out = capture(model, x, "attn", layers=[0])["attn", 0]
    hidden = layer.input_layernorm(model.get_input_embeddings()(x))
    value = layer.self_attn.v_proj(hidden).unflatten(-1, (2, -1)).repeat_interleave(2, -2)
    want = layer.self_attn.o_proj(value.flatten(-2))
    torch.testing.assert_close(out[:, 2:5], want[:, 2:5], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_rows_of_the_image_change():
    model, x = make("llama"), ids(2, 18)
    plain = capture(model, x, "weights", layers=[0])["weights", 0]
    with regard.patch(model, EEMLLM(), spans=moving.SPANS):
        got = capture(model, x, "weights", layers=[0])["weights", 0]
    image = [2, 3, 4, 6, 7]
    others = [c for c in range(18) if c not in image]
    assert torch.equal(plain[:, :, others], got[:, :, others])
    torch.testing.assert_close(got[:, :, image], torch.eye(18)[image].expand(2, 4, 5, 18))


@pytest.mark.parametrize("update", ["self", "mlp", "none"])
def test_moving_checks(update):
    method = EEMLLM(update)
    moving.changes_something(method)
    moving.cached_is_uncached(method)
    moving.leaves_the_model_as_it_was(method)
    moving.pieces_are_the_whole(method)
    moving.padding_does_not_matter(lambda: EEMLLM(update))


def test_it_needs_its_span():
    moving.needs_its_span(EEMLLM(), "image")


@pytest.mark.parametrize("update", ["self", "none"])
def test_an_empty_image_changes_nothing(monkeypatch, update):
    monkeypatch.setattr(moving, "SPANS", EMPTY)
    moving.changes_nothing(EEMLLM(update))


@torch.no_grad()
def test_on_images():
    from tests.steer.tiny_vlm import VLMS

    for name, build in VLMS.items():
        model, inputs, spans = build()
        plain = model(**inputs).logits
        for update in ("self", "none"):
            with regard.patch(model, EEMLLM(update), spans=spans):
                steered = model(**inputs).logits
                tokens = model.generate(**inputs, **moving.GREEDY)
            torch.testing.assert_close(steered[:, :3], plain[:, :3], atol=1e-5, rtol=1e-5)
            assert (steered - plain)[:, 3:19].abs().max() > 1e-3, name
            # The end of the text is not to come yet.
            best = steered[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()
            assert tokens[0, inputs["input_ids"].shape[1]] == best, name
        no_image = Spans({**spans.ranges, "image": ()}, spans.length)
        with regard.patch(model, EEMLLM("none"), spans=no_image):
            torch.testing.assert_close(model(**inputs).logits, plain, atol=1e-6, rtol=1e-6)
        assert torch.equal(model(**inputs).logits, plain), name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: EEMLLM("all"), "update must be one of"),
        (lambda: image_alone(((1, 2),), "text"), "sees must be one of"),
        (lambda: image_alone(((3, 2),)), "0 <= start <= stop"),
        (lambda: composite_mask(5, (2, 6)), "does not lie inside 5 tokens"),
        (lambda: CompositeAttention(16, 3), "expected multiples"),
        (lambda: composite_attention(*rand(3, 1, 1, 4, 2), [(2, 3), (1, 2)]), "ascending ranges"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_pairs_of_the_benchmark():
    row = benchmark.pairs(64, 8)[0]
    assert row["note"].startswith(f"{8 * 64 + 8 * 9 // 2 + 64:,} pairs")
    notes = [r["note"] for r in benchmark.growth((512, 2048))]
    growths = [float(note.split("I^")[1].split(":")[0]) for note in notes]
    assert growths[0] == pytest.approx(1, abs=0.1) and growths[1] == pytest.approx(1.9, abs=0.1)
