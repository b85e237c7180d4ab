"""Positions of several axes (Qwen2-VL): call.rotary against the model's own queries and keys."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.models import Edit, Method
from tests.steer.tiny_vlm import IMAGE, llava, qwen2_5_vl, qwen2_vl

LONG = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


class Records(Method):
    """Keeps what ``call.rotary`` says in one layer."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.axes: list[torch.Tensor] = []

    def attend(self, call, inner):
        if call.layer == 1:
            rotary = call.rotary
            q = rotary.unrotate(call.q, rotary.query_axes)
            k = rotary.unrotate(call.k, rotary.key_axes)
            again = rotary.rotate(q, rotary.query_axes), rotary.rotate(k, rotary.key_axes)
            torch.testing.assert_close(again, (call.q, call.k), atol=2e-5, rtol=2e-5)
            assert rotary.axes == rotary.key_axes.shape[0]
            self.seen.append((q, k))
            self.axes.append(rotary.key_axes)
        return inner(call)


class Raw:
    """Queries and keys of one layer as its projections put them out, before any rotation."""

    def __init__(self, model) -> None:
        attention = model.get_decoder().layers[1].self_attn
        self.found = {"q": [], "k": []}
        self.handles = [
            getattr(attention, f"{name}_proj").register_forward_hook(self.keep(name))
            for name in self.found
        ]

    def keep(self, name):
        def hook(module, args, out):
            self.found[name].append(out.unflatten(-1, (-1, 8)).transpose(1, 2))

        return hook

    def check(self, seen) -> None:
        """Every pass's queries are its own, its keys those of all passes so far."""
        for handle in self.handles:
            handle.remove()
        assert len(seen) == len(self.found["q"]) > 1
        for step, (q, k) in enumerate(seen):
            torch.testing.assert_close(q, self.found["q"][step], atol=2e-5, rtol=2e-5)
            keys = torch.cat(self.found["k"][: step + 1], 2)
            torch.testing.assert_close(k, keys, atol=2e-5, rtol=2e-5)


def pair(build):
    """Two sequences with an image each, the second one with five tokens of padding in front."""
    model, inputs, _ = build()
    x = inputs["input_ids"]
    text = torch.tensor([[11, 12, 13, 14, 15]])
    both = torch.cat([torch.cat([x, text], 1), torch.cat([0 * text, x.flip(0)], 1)])
    out = {
        name: torch.cat([value, value * 0.5])
        for name, value in inputs.items()
        if value.is_floating_point()
    }
    if "image_grid_thw" in inputs:
        out["image_grid_thw"] = inputs["image_grid_thw"].repeat(2, 1)
        out["mm_token_type_ids"] = (both == IMAGE).int()
    return model, {"input_ids": both, "attention_mask": (both != 0).long(), **out}


@pytest.mark.parametrize(("build", "axes"), [(llava, 1), (qwen2_vl, 3), (qwen2_5_vl, 3)])
@torch.no_grad()
def test_queries_and_keys_before_the_rotary_embedding(build, axes):
    model, inputs = pair(build)
    raw, method = Raw(model), Records()
    with regard.patch(model, method):
        model.generate(**inputs, **LONG)
    raw.check(method.seen)
    assert [at.shape[0] for at in method.axes] == [axes] * 4
    # An image of 4 x 4 tokens: row and column apart, time at rest.
    if axes == 3:
        time, height, width = method.axes[-1][:, 1, 8:24] - 3
        assert not time.any()
        assert torch.equal(height, torch.arange(16) // 4)
        assert torch.equal(width, torch.arange(16) % 4)


@pytest.mark.parametrize("build", [qwen2_vl, qwen2_5_vl])
@torch.no_grad()
def test_passes_of_the_model_and_beams(build):
    model, inputs, _ = build()
    answer = torch.tensor([[9, 12, 13]])
    raw, method = Raw(model), Records()
    with regard.patch(model, method):
        cache = model(**inputs, use_cache=True).past_key_values
        model(answer, past_key_values=cache)
        model(answer[:, :1], past_key_values=cache)
    raw.check(method.seen)
    assert method.axes[-1].shape == (3, 1, 28)
    # Steps of beams: every sequence three times, all of them at the same positions.
    method = Records()
    with regard.patch(model, method):
        model.generate(**inputs, num_beams=3, **LONG)
    assert method.axes[-1].shape == (3, 3, 27)
    assert torch.equal(method.axes[-1], method.axes[-1][:, :1].expand(-1, 3, -1))


@torch.no_grad()
def test_axes_join_in_the_cache():
    """Passes that give no positions, two axes fewer, or one more which counts tokens."""
    model, x = qwen2_vl()[0], torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]])
    decoder, at = model.get_decoder(), torch.arange(8)[None, None]
    three = torch.cat([at, at + 1, at + 2])
    method, raw = Records(), Raw(model)
    with regard.patch(model, method):
        cache = decoder(x[:, :2], use_cache=True).past_key_values
        passes = ((2, 4, at[0]), (4, 6, three), (6, 8, torch.cat([at + 9, three])))
        for first, stop, places in passes:
            here = {"past_key_values": cache, "position_ids": places[..., first:stop]}
            decoder(x[:, first:stop], attention_mask=torch.ones(1, stop), **here)
    raw.check(method.seen)
    assert [a.shape[0] for a in method.axes] == [1, 1, 3, 3]
    want = torch.cat([at[..., :4].expand(3, -1, -1), three[..., 4:]], -1)
    assert torch.equal(method.axes[-1], want)
    # And the other way round: a first pass of four axes, then of three.
    method, raw = Records(), Raw(model)
    four = torch.cat([at + 9, three])
    with regard.patch(model, method):
        mask = torch.ones(1, 4)
        cache = decoder(x[:, :4], position_ids=four[..., :4], attention_mask=mask).past_key_values
        decoder(x[:, 4:6], position_ids=three[..., 4:6], past_key_values=cache)
    raw.check(method.seen)
    assert torch.equal(method.axes[-1], three[..., :6])


@torch.no_grad()
def test_methods_of_one_axis_are_told():
    model, inputs, _ = qwen2_vl()
    seen = []

    class OneAxis(Method):
        def attend(self, call, inner):
            seen.append((call.rotary.query_positions, call.rotary.key_positions))
            return inner(call)

    with regard.patch(model, OneAxis()):
        with pytest.raises(ValueError, match="differ between 3 axes"):
            model(**inputs)
        # Text stands at the same position on all axes.
        model.generate(torch.tensor([[1, 5, 6, 7]]), **LONG)
    queries, keys = seen[-1]
    assert queries.tolist() == [[6]] and keys.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


@torch.no_grad()
def test_edited_positions_are_those_of_the_keys():
    model, inputs, _ = qwen2_vl()
    raw, method = Raw(model), Records()

    class Moves(Method):
        def edits(self):
            return [Edit("positions", lambda positions, site: positions * 2)]

    with regard.patch(model, method):
        model(**inputs)
        with regard.patch(model, Moves()):
            model(**inputs)
    for handle in raw.handles:
        handle.remove()
    assert torch.equal(method.axes[1], 2 * method.axes[0])
    for at, (q, _) in enumerate(method.seen):
        torch.testing.assert_close(q, raw.found["q"][at], atol=2e-5, rtol=2e-5)
