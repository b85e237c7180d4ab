"""PINE against a loop over heads and queries, its invariance, and models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import pine as benchmark
from tests.golden import adapter, load
from tests.golden.pine import rotate
from tests.models.tiny import ids, make
from tests.steer import moving
from tests.steer.tiny_vlm import llava

import regard
from regard.models import Spans
from regard.steer.pine import PINE, PineLayout, pine_attention
from regard.steer.pine_order import document_shifts

DATA = Path(__file__).parents[1] / "golden" / "data"
DOCS = [(2, 5), (5, 9), (9, 11)]
SPANS = Spans.of(14, documents=DOCS)


@pytest.fixture(autouse=True)
def documents(monkeypatch):
    monkeypatch.setattr(moving, "SPANS", SPANS)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def tensors(layout, b=2, h=4, hkv=2, d=8):
    n = layout.length
    return rand(b, h, n, d), rand(b, hkv, n, d, seed=1), rand(b, hkv, n, 5, seed=2)


rope = partial(rotate, base=100.0)


def written_out(q, k, v, layout, rope=rope, places=None):
    """One query of one head at a time, its keys rotated for it, as the paper says.

    `places` `(A, M)` are the columns' positions on several axes, moved alike; default the columns.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    (batch, heads, n, d), end = q.shape, layout.end
    # What a column is away from its own number, on every axis.
    away = torch.zeros(n, dtype=torch.int64) if places is None else places - torch.arange(n)
    spans, start = [], layout.prefix
    for size in layout.docs:
        spans.append((start, start + size))
        start += size
    out = q.new_zeros(batch, heads, n, v.shape[-1])

    def scores(b, h, t, own):
        """Mean weight of each document among the keys of all documents, positions left out."""
        s = torch.full((n,), -torch.inf, dtype=q.dtype)
        for at, (a, z) in enumerate(spans):
            if at != own:
                s[a:z] = k[b, h, a:z] @ q[b, h, t] / d**0.5
        w = s.softmax(0)
        return [float(w[a:z].sum()) / (z - a) for a, z in spans]

    for b in range(batch):
        for h in range(heads):
            for t in range(n):
                where = list(range(n))
                own = next((at for at, (a, z) in enumerate(spans) if a <= t < z), None)
                mine = t
                if own is not None:
                    a, z = spans[own]
                    total = [0.0] * len(spans)
                    if len(spans) > 1:
                        for row in range(a, z):
                            total = [
                                x + y for x, y in zip(total, scores(b, h, row, own), strict=True)
                            ]
                    total[own] = float("inf")
                    mine = end - (z - t)
                elif t >= end:
                    total = scores(b, h, t, None)
                if own is not None or t >= end:
                    shift = 0
                    for at in sorted(range(len(spans)), key=lambda x: -total[x]):
                        a, z = spans[at]
                        for c in range(a, z):
                            where[c] = end - (z - c) - shift
                        shift += z - a
                    seen = [
                        c
                        for c in range(n)
                        if (where[c] <= mine if t < end else c <= t) and (c < end or t >= end)
                    ]
                else:
                    seen = list(range(t + 1))
                at = torch.tensor([where[c] for c in seen]) + away[..., seen]
                keys = rope(k[b : b + 1, h : h + 1, seen], at)[0, 0]
                query = torch.tensor([mine]) + away[..., t : t + 1]
                query = rope(q[b : b + 1, h : h + 1, t : t + 1], query)[0, 0, 0]
                out[b, h, t] = (keys @ query / d**0.5).softmax(0) @ v[b, h, seen]
    return out


@pytest.mark.parametrize(
    "layout",
    [
        PineLayout(2, (3, 1, 4), 3),
        PineLayout(0, (2, 3), 2),
        PineLayout(3, (2, 2, 1, 3), 0),
        PineLayout(1, (4,), 2),
    ],
)
def test_is_the_loop_written_out(layout):
    q, k, v = tensors(layout)
    want = written_out(q, k, v, layout)
    got = pine_attention(q, k, v, layout, rope)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    # Decoding: the last rows alone.
    if layout.suffix:
        last = pine_attention(q[:, :, -layout.suffix :], k, v, layout, rope)
        torch.testing.assert_close(last, want[:, :, -layout.suffix :], atol=1e-10, rtol=1e-10)
    part = pine_attention(q[:, :, layout.prefix :], k, v, layout, rope)
    torch.testing.assert_close(part, want[:, :, layout.prefix :], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("layout", [PineLayout(3, (6,), 4), PineLayout(5, (), 8)])
def test_one_document_is_causal_attention(layout):
    q, k, v = tensors(layout, hkv=4)
    at = torch.arange(13)
    want = torch.nn.functional.scaled_dot_product_attention(
        rope(q, at), rope(k, at), v, is_causal=True
    )
    torch.testing.assert_close(pine_attention(q, k, v, layout, rope), want)


def test_order_of_documents_has_no_effect():
    layout, order = PineLayout(2, (3, 1, 4), 3), [2, 0, 1]
    q, k, v = tensors(layout)
    columns = [torch.arange(2), *(torch.arange(13)[a:z] for a, z in ((5 + 1, 10), (2, 5), (5, 6)))]
    index = torch.cat([*columns, torch.arange(10, 13)])
    moved = PineLayout(2, tuple(layout.docs[at] for at in order), 3)
    a = pine_attention(q, k, v, layout, rope)
    b = pine_attention(q[:, :, index], k[:, :, index], v[:, :, index], moved, rope)
    torch.testing.assert_close(a[:, :, index], b, atol=1e-10, rtol=1e-10)


def test_shifts_are_orders():
    layout = PineLayout(2, (3, 1, 4), 3)
    q, k, _ = tensors(layout)
    shifts = document_shifts(q, k, layout)
    assert not shifts[:, :, :2].any()
    for at, (a, z) in enumerate(((2, 5), (5, 6), (6, 10))):
        assert not shifts[:, :, a:z, at].any()
        assert (shifts[:, :, a:z] == shifts[:, :, a : a + 1]).all()
    # In every row the documents fill the places from the end without gaps.
    for row in shifts[:, :, 2:].flatten(0, 2).tolist():
        covered = sorted(
            place
            for shift, size in zip(row, layout.docs, strict=True)
            for place in range(shift, shift + size)
        )
        assert covered == list(range(8))


def shuffled(x):
    """Documents of the model's tokens in the order 3, 1, 2, and their spans."""
    index = torch.tensor([0, 1, 9, 10, 2, 3, 4, 5, 6, 7, 8, *range(11, x.shape[1])])
    return x[:, index], index, Spans.of(14, documents=[(2, 4), (4, 7), (7, 11)])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_model_does_not_see_their_order(kind):
    model, x = make(kind), ids(2, 18)
    other, index, spans = shuffled(x)
    plain = model(x).logits[:, 11:]
    assert (plain - model(other).logits[:, 11:]).abs().max() > 1e-2
    with regard.patch(model, PINE(), spans=SPANS):
        first = model(x).logits
        tokens = model.generate(x[:, :14], **moving.GREEDY)
    with regard.patch(model, PINE(), spans=spans):
        second = model(other).logits
        assert torch.equal(model.generate(other[:, :14], **moving.GREEDY)[:, 14:], tokens[:, 14:])
    torch.testing.assert_close(second, first[:, index], atol=2e-4, rtol=2e-4)


def test_moving_checks():
    method = PINE()
    moving.changes_something(method)
    moving.cached_is_uncached(method)
    moving.leaves_the_model_as_it_was(method)
    moving.padding_does_not_matter(PINE)
    moving.beams_are_those_of_a_slow_search(method)
    moving.needs_its_span(method, "documents")


@torch.no_grad()
def test_rows_of_the_prefix_stay_as_they_are():
    model, x = make("llama"), ids(2, 18)
    plain = model(x).logits
    with regard.patch(model, PINE(), spans=SPANS):
        got = model(x).logits
        torch.testing.assert_close(got[:, :2], plain[:, :2], atol=1e-5, rtol=1e-5)
        # A prompt may be cut before and behind the documents.
        cache = model(x[:, :2], use_cache=True).past_key_values
        middle = model(x[:, 2:12], past_key_values=cache).logits
        last = model(x[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([middle, last], 1), got[:, 2:], **moving.TOLERANCE)
    assert (got - plain)[:, 2:].abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("documents", [[], [(2, 11)]])
def test_less_than_two_documents_change_nothing(monkeypatch, documents):
    monkeypatch.setattr(moving, "SPANS", Spans.of(14, documents=documents))
    moving.changes_nothing(PINE())


@torch.no_grad()
def test_on_images():
    """An image in two halves and the question as documents."""
    model, inputs, _ = llava()
    plain = model(**inputs).logits
    spans = Spans.of(23, documents=[(3, 11), (11, 19)])
    with regard.patch(model, PINE(), spans=spans):
        steered = model(**inputs).logits
        tokens = model.generate(**inputs, **moving.GREEDY)
    assert (steered - plain).abs().max() > 1e-3
    # The end of the text is not to come yet.
    assert tokens[0, 23] == steered[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_what_a_running_model_refuses():
    model, x = make("llama"), ids(1, 14)
    with (
        regard.patch(model, PINE(), spans=Spans.of(14, documents=[(2, 5), (6, 9)])),
        pytest.raises(ValueError, match="documents without gaps"),
    ):
        model(x)
    with regard.patch(model, PINE(), spans=SPANS), pytest.raises(ValueError, match="in one pass"):
        model(x[:, :6])
    window = regard.Causal() & regard.SlidingWindow(3)
    with (
        regard.patch(model, window, PINE(), spans=SPANS),
        pytest.raises(ValueError, match="expected a causal layer"),
    ):
        model(x)
    for kind, words in (("qwen3", "expected a causal layer"), ("gemma2", "soft-capped|causal")):
        other = make(kind, implementation="eager")
        with regard.patch(other, PINE(), spans=SPANS), pytest.raises(ValueError, match=words):
            other(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PineLayout(1, (2, 0), 1), "documents >= 1"),
        (lambda: PineLayout(-1, (2,), 1), "lengths >= 0"),
        (
            lambda: pine_attention(
                *tensors(PineLayout(1, (2, 2), 1)), PineLayout(1, (2,), 1), rope
            ),
            "the layout has 4",
        ),
        (
            lambda: pine_attention(
                rand(2, 4, 3, 8),
                *tensors(PineLayout(1, (2, 2), 1))[1:],
                PineLayout(1, (2, 2), 1),
                rope,
            ),
            "inside the documents",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_golden_replays_in_another_order():
    case = load(DATA / "pine.npz")
    case["meta"]["permutation"] = [0, 1, 2]
    case["permuted_index"] = case["permuted_index"] * 0 + range(19)
    got = adapter(DATA / "pine.npz").replay(case)
    assert abs(got["out_permuted"] - case["out"]).max() < 1e-4


def test_work_of_the_benchmark():
    growths = [float(r["note"].split("N^")[1].split(":")[0]) for r in benchmark.growth((128, 512))]
    assert growths[0] == pytest.approx(2, abs=0.1) and growths[1] == pytest.approx(1, abs=0.1)
