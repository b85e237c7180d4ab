"""What methods and probes are given: stores, positions, rotary embedding, layouts, statistics."""

from __future__ import annotations

import pytest
import torch

import regard
from regard import BlockLayout, Causal, Full, SlidingWindow
from regard.models import Edit, Method, SiteProbe, StatsProbe

from .tiny import ids, left_padding, make

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


class Records(Method):
    """Calls a function with every attention call."""

    def __init__(self, fn) -> None:
        self.fn = fn

    def attend(self, call, inner):
        self.fn(call)
        return inner(call)


@torch.no_grad()
def test_stores_and_their_lives():
    model, x = make("llama"), ids(1, 8)
    seen = []

    def count(call):
        call.store["calls"] = call.store.get("calls", 0) + 1
        call.cache_store["calls"] = call.cache_store.get("calls", 0) + 1
        if call.layer == 3:
            seen.append((call.store["calls"], call.cache_store["calls"]))

    with regard.patch(model, Records(count), Records(count)):  # each has its own
        out = model(x, use_cache=True)
        for token in range(2):
            model(x[:, :1] + token, past_key_values=out.past_key_values)
        assert seen == [(4, 4)] * 2 + [(4, 8)] * 2 + [(4, 12)] * 2
        seen.clear()
        out.past_key_values.crop(-2)
        model(x[:, :1], past_key_values=out.past_key_values)
        model(x, use_cache=False)
        assert seen == [(4, 4)] * 4


def test_a_call_says_where_it_stands():
    model, x, mask = make("gemma3"), ids(2, 9), left_padding(2, 9, 3)
    seen = []

    def note(call):
        seen.append(
            (
                call.layer,
                call.decoding,
                call.prompt,
                call.rows.tolist(),
                call.columns.tolist(),
                call.positions[-1, -1].item(),
                (call.n, call.m) == (call.q.shape[2], call.k.shape[2]),
            )
        )

    with regard.patch(model, Records(note)):
        model.generate(
            x, attention_mask=mask, max_new_tokens=3, min_length=12, do_sample=False, top_k=None
        )
    first = [*range(9)]
    assert seen[:2] == [(layer, False, 9, first, first, 5, True) for layer in range(2)]
    # full layer, then one whose cache has dropped what its window of 6 keys does not reach
    assert seen[8] == (0, True, 9, [10], [*range(11)], 7, True)
    assert seen[9] == (1, True, 9, [10], [*range(5, 11)], 7, True)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox", "qwen3"])
@torch.no_grad()
def test_queries_and_keys_before_the_rotary_embedding(kind: str):
    model, x, mask = make(kind), ids(2, 9), left_padding(2, 9, 3)
    raw: dict[str, list[torch.Tensor]] = {"q": [], "k": []}
    layer = model.gpt_neox.layers[1].attention if kind == "gpt_neox" else None
    if layer is not None:

        def split(module, args, out):
            q, k, _ = out.unflatten(-1, (4, 24)).transpose(1, 2).chunk(3, -1)
            raw["q"].append(q)
            raw["k"].append(k)

        handles = [layer.query_key_value.register_forward_hook(split)]
    else:
        attention = model.model.layers[1].self_attn

        def keep(name):
            def hook(module, args, out):
                heads = out if out.dim() == 4 else out.unflatten(-1, (-1, 8))
                heads = (
                    heads if heads.shape[1] != 9 and heads.shape[1] != 1 else heads.transpose(1, 2)
                )
                raw[name].append(heads)

            return hook

        normed = kind != "llama"
        parts = ("q_norm", "k_norm") if normed else ("q_proj", "k_proj")
        handles = [getattr(attention, part).register_forward_hook(keep(part[0])) for part in parts]
    seen = []

    def note(call):
        if call.layer == 1:
            rotary = call.rotary
            q = rotary.unrotate(call.q, rotary.query_positions)
            k = rotary.unrotate(call.k, rotary.key_positions)
            torch.testing.assert_close(rotary.rotate(k, rotary.key_positions), call.k, **TOLERANCE)
            seen.append((q, k, call.own.offset))

    with regard.patch(model, Records(note)):
        model.generate(x, attention_mask=mask, max_new_tokens=4, min_length=13, do_sample=False)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    every = torch.cat(raw["k"], 2)
    for step, (q, k, offset) in enumerate(seen):
        torch.testing.assert_close(q, raw["q"][step], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(k, every[:, :, offset : 9 + step], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_rotary_needs_to_have_seen_the_keys():
    model, x = make("llama"), ids(1, 8)
    cache = model(x, use_cache=True).past_key_values
    with (
        regard.patch(model, Records(lambda call: call.rotary)),
        pytest.raises(ValueError, match="positions of 0 of 9 keys are known"),
    ):
        model(x[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_selector_hands_on_a_layout():
    model, x = make("llama"), ids(2, 16)

    class Local(Method):
        def attend(self, call, inner):
            index = torch.tensor([[0, -1], [0, 1], [1, 2], [2, 3]])[None, None]
            layout = BlockLayout.from_index(index, call.n, call.m, 4)
            return inner(call.replace(layout=layout))

    blocks = torch.arange(16) // 4
    near = (blocks[:, None] - blocks[None] <= 1) & torch.ones(16, 16).tril().bool()
    with regard.patch(model, regard.Dense(near)):
        expected = model(x).logits
    with regard.patch(model, Local()):
        torch.testing.assert_close(model(x).logits, expected, **TOLERANCE)
    edit = Edit("weights", lambda y, at: y)

    class Same(Method):
        def edits(self):
            return [edit]

    with regard.patch(model, Same(), Local()):
        torch.testing.assert_close(model(x).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_a_method_widens_the_mask_but_never_over_padding():
    model, x, mask = make("llama"), ids(2, 10), left_padding(2, 10, 3)

    class Sees(Method):
        def mask(self, pattern, call):
            return Full()

    with regard.patch(model, Sees()):
        both = model(x, attention_mask=mask).logits
        alone = model(x[1:, 3:]).logits
    torch.testing.assert_close(both[1:, 3:], alone, **TOLERANCE)
    assert not torch.allclose(both[0, 0], model(x).logits[0, 0])


@torch.no_grad()
def test_merging_parts_of_the_keys():
    model, x = make("llama"), ids(1, 15)
    expected = model(x).logits

    class Halves(Method):
        """Near and far keys, merged by their log-sum-exp."""

        def attend(self, call, inner):
            near = SlidingWindow(4)
            parts = [
                regard.attend(
                    call.q, call.k, call.v, mask=call.mask & m, scale=call.scale, return_lse=True
                )
                for m in (near, ~near)
            ]
            return regard.merge(parts)[0]

    with regard.patch(model, Halves()):
        torch.testing.assert_close(model(x).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_statistics_equal_those_of_eager_weights(kind: str):
    model, x = make(kind, implementation="eager"), ids(2, 19)
    weights = torch.stack(model(x, output_attentions=True).attentions)
    with regard.watch(model, probe := StatsProbe(["received", "max_weight"])) as seen:
        model(x)
    assert list(seen.result()[0]) == [0, 1, 2, 3]
    torch.testing.assert_close(probe.stacked("received"), weights.sum(-2), **TOLERANCE)
    torch.testing.assert_close(seen[probe][0][1]["max_weight"], weights[1].amax(-1), **TOLERANCE)
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_probe_sees_the_patched_mask_from_inside_and_outside():
    model, x = make("llama"), ids(1, 12)
    inside, outside = StatsProbe(["max_weight"]), StatsProbe(["max_weight"])
    with (
        regard.watch(model, outside),
        regard.patch(model, SlidingWindow(0) & Causal()),
        regard.watch(model, inside, layers=[2]),
    ):
        model(x)
    assert list(inside.result()[0]) == [2]
    torch.testing.assert_close(inside.result()[0][2]["max_weight"], torch.ones(1, 4, 12))
    torch.testing.assert_close(outside.result()[0][2]["max_weight"], torch.ones(1, 4, 12))


@torch.no_grad()
def test_site_probe_equals_eager_weights_and_changes_nothing():
    model, x = make("llama", implementation="eager"), ids(2, 12)
    with regard.patch(model, Full()):
        plain = model(x).logits
    expected = model(x, output_attentions=True).attentions
    weights = SiteProbe("weights", heads=[0, 2], rows="last", layers=[1, 3])
    logits = SiteProbe("logits", layers=[1])
    with regard.watch(model, weights, logits) as seen:
        assert torch.equal(model(x).logits, plain)
        model(x)
    last, scores = seen.result()
    assert len(last) == 2 and list(last[0]) == [1, 3]
    torch.testing.assert_close(last[0][3], expected[3][:, [0, 2], 11:], **TOLERANCE)
    torch.testing.assert_close(scores[0][1].softmax(-1), expected[1], **TOLERANCE)


def test_probes_refuse_what_they_cannot_see():
    model, x = make("llama"), ids(1, 6)

    class Own(Method):
        def attend(self, call, inner):
            return inner(call) * 2

    with (
        pytest.raises(ValueError, match="layer 0 is computed by a patched method in its own way"),
        regard.patch(model, Own()),
        regard.watch(model, StatsProbe(["entropy"])),
    ):
        model(x)
    with pytest.raises(ValueError, match="soft-capped"):
        capped = make("gemma2", implementation="eager")
        with regard.watch(capped, StatsProbe(["entropy"])):
            capped(x)
    with pytest.raises(ValueError, match="int is no probe"), regard.watch(model, 3):
        pass
    with pytest.raises(ValueError, match="no probe given"), regard.watch(model):
        pass

    class Writes:
        def observers(self):
            return [Edit("heads", lambda y, at: 2 * y)]

        def result(self):
            return None

    with (
        pytest.raises(ValueError, match=r"make it with Edit\(..., observes=True\)"),
        regard.watch(model, Writes()),
    ):
        pass


def test_gradients_flow_through_edits():
    model, x = make("llama"), ids(1, 7)
    scale = torch.ones((), requires_grad=True)

    class Scaled(Method):
        def edits(self):
            return [Edit("logits", lambda y, at: y * scale, rows="last")]

    def loss(value):
        nonlocal scale
        scale = value
        with regard.patch(model, Scaled()):
            return model(x).logits[0, -1].square().sum()

    (slope,) = torch.autograd.grad(loss(scale), scale)
    step = 1e-2
    with torch.no_grad():
        numeric = (loss(torch.tensor(1 + step)) - loss(torch.tensor(1 - step))) / (2 * step)
    torch.testing.assert_close(slope, numeric, atol=1e-2, rtol=2e-2)


@torch.no_grad()
def test_sequences_that_were_repeated_keep_their_positions():
    """As generate does for beams: the cache of a prompt, each sequence twice."""
    model, x = make("llama"), ids(2, 7)
    places = torch.arange(7)[None] + torch.tensor([[0], [5]])

    class Look(Method):
        def attend(self, call, inner):
            self.seen = call.rotary.key_positions
            return inner(call)

    method = Look()
    with regard.patch(model, method):
        cache = model(x, position_ids=places, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        new = ids(4, 1, seed=2)
        after = (places[:, -1:] + 1).repeat_interleave(2, 0)
        model(new, position_ids=after, past_key_values=cache)
    assert torch.equal(method.seen, torch.cat([places.repeat_interleave(2, 0), after], 1))


@torch.no_grad()
def test_a_fork_copies_what_is_known_of_caches_inside_a_cache():
    model, x = make("llama"), ids(1, 6)

    class Count(Method):
        def attend(self, call, inner):
            store = call.cache_store
            store[call.layer] = store.get(call.layer, 0) + call.n
            self.seen = store[call.layer]
            return inner(call)

    method = Count()
    with regard.patch(model, method):
        outer = model(x, use_cache=True).past_key_values
        inner = model(x[:, :4], use_cache=True).past_key_values
        outer.branch = inner
        twin = regard.models.fork(model, outer)
        assert twin.branch is not inner
        for cache, count in ((twin, 7), (twin.branch, 5), (twin.branch, 6), (inner, 5)):
            model(x[:, :1], past_key_values=cache)
            assert method.seen == count
