"""Edits at the sites: against the same change made by hand on the model's weights or inputs."""

from __future__ import annotations

import pytest
import torch

import regard
from regard import Causal, SlidingWindow
from regard.models import After, Edit, In, Method, SiteProbe, Spans

from .tiny import KINDS, ids, make

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SITES = ("positions", "logits", "weights", "heads", "attn", "mlp", "resid", "lm_logits")


class Edits(Method):
    """Whatever edits it is given."""

    def __init__(self, *edits: Edit) -> None:
        self._edits = edits

    def edits(self):
        return self._edits


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_edit_that_changes_nothing(kind: str, site: str):
    model, x = make(kind), ids(2, 12)
    expected = model(x).logits
    calls = []

    def same(y, at):
        calls.append((at.layer, y.shape))
        return y

    with regard.patch(model, Edits(Edit(site, same))):
        torch.testing.assert_close(model(x).logits, expected, **TOLERANCE)
    if site in ("positions", "lm_logits"):
        assert [layer for layer, _ in calls] == [-1]
    else:
        assert [layer for layer, _ in calls] == [0, 1, 2, 3]
    shapes = {"logits": (2, 4, 12, 12), "weights": (2, 4, 12, 12), "heads": (2, 12, 4, 8)}
    shapes |= {"positions": (1, 12), "lm_logits": (2, 12, 64)}
    assert {shape for _, shape in calls} == {shapes.get(site, (2, 12, 32))}


@torch.no_grad()
def test_heads_equals_columns_of_the_projection():
    model, x = make("llama"), ids(2, 12)
    with regard.patch(model, Edits(Edit("heads", lambda y, at: 0 * y, layers=[1], heads=[0, 3]))):
        got = model(x).logits
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight[:, :8] = 0
    weight[:, 24:] = 0
    torch.testing.assert_close(got, model(x).logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("site", "module"), [("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")]
)
@torch.no_grad()
def test_blocks_equal_their_last_projection(site: str, module: str):
    model, x = make("llama"), ids(2, 12)
    with regard.patch(model, Edits(Edit(site, lambda y, at: -2 * y, layers=[2]))):
        got = model(x).logits
    model.model.layers[2].get_submodule(module).weight.mul_(-2)
    torch.testing.assert_close(got, model(x).logits, **TOLERANCE)


@torch.no_grad()
def test_resid_is_what_transformers_calls_hidden_states():
    model, x = make("llama"), ids(2, 12)
    hidden = model(x, output_hidden_states=True).hidden_states
    with regard.watch(model, SiteProbe("resid")) as seen:
        model(x)
    (layers,) = seen.result()
    for layer in range(3):  # the last one is given after the final norm
        torch.testing.assert_close(layers[layer], hidden[layer + 1], **TOLERANCE)


@torch.no_grad()
def test_logits_of_minus_infinity_are_a_mask():
    model, x = make("qwen3"), ids(2, 14)

    def near(y, at):
        columns = torch.arange(y.shape[-1])
        return y.masked_fill(at.rows[:, None] - columns > 3, -torch.inf)

    with regard.patch(model, Edits(Edit("logits", near))):
        got = model(x).logits
    with regard.patch(model, SlidingWindow(3)):
        torch.testing.assert_close(got, model(x).logits, **TOLERANCE)


@torch.no_grad()
def test_weights_of_chosen_heads_and_rows():
    model, x = make("llama", implementation="eager"), ids(2, 14)
    plain = model(x, output_attentions=True).attentions[2]

    def sink(y, at):
        return torch.zeros_like(y).index_fill(3, torch.tensor(0), 1)

    edit = Edit("weights", sink, layers=[2], heads=[1], rows="last")
    with (
        regard.patch(model, Edits(edit)),
        regard.watch(model, SiteProbe("weights", layers=[2])) as seen,
    ):
        model(x)
    got = seen.result()[0][2]
    changed = (got - plain).abs().amax(-1) > 1e-4
    assert changed[:, 1, 13].all() and int(changed.sum()) == 2
    assert torch.equal(got[:, 1, 13], torch.eye(14)[:1].expand(2, -1))


@torch.no_grad()
def test_masked_entries_stay_masked():
    model, x = make("llama"), ids(1, 10)
    ones = Edits(Edit("weights", lambda y, at: torch.ones_like(y)))
    zeros = Edits(Edit("logits", lambda y, at: torch.zeros_like(y)))
    for method in (ones, zeros):
        with regard.patch(model, method), regard.watch(model, SiteProbe("weights")) as seen:
            model(x)
        weights = seen.result()[0][0]
        inside = torch.ones(10, 10).tril().bool()
        if method is zeros:  # uniform over the allowed keys
            assert (weights[..., ~inside] == 0).all()
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 10))
    # ones on masked keys must not reach the output: perturb the last token, look at the first rows
    moved = x.clone()
    moved[0, 9] = 1 + moved[0, 9] % 60
    with regard.patch(model, ones):
        assert torch.equal(model(x).logits[:, :9], model(moved).logits[:, :9])


@torch.no_grad()
def test_positions_equal_position_ids():
    model, x = make("llama"), ids(2, 12)
    odd = torch.cat([torch.arange(5), torch.full((4,), 5), torch.arange(6, 9)])[None]
    mask = torch.ones_like(x)
    expected = model(x, position_ids=odd, attention_mask=mask).logits

    def place(y, at):
        return odd[:, at.rows].expand_as(y) if at.rows[-1] < 12 else y - 3

    method = Edits(Edit("positions", place))
    with regard.patch(model, method):
        torch.testing.assert_close(model(x).logits, expected, **TOLERANCE)
        torch.testing.assert_close(model(x, use_cache=False).logits, expected, **TOLERANCE)
        torch.testing.assert_close(model(x, attention_mask=mask).logits, expected, **TOLERANCE)
        tokens = model.generate(x, max_new_tokens=4, min_length=16, do_sample=False)
    for step in range(12, 16):
        after = torch.cat([odd, torch.arange(9, 9 + step - 12)[None]], 1)
        whole = model(tokens[:, :step], position_ids=after, attention_mask=tokens[:, :step] * 0 + 1)
        assert torch.equal(whole.logits[:, -1].argmax(-1), tokens[:, step])


@torch.no_grad()
def test_lm_logits_in_generate():
    model, x = make("llama"), ids(2, 8)

    def only_seven(y, at):
        return torch.full_like(y, -1e4).index_fill(2, torch.tensor(7), 0)

    with regard.patch(model, Edits(Edit("lm_logits", only_seven, rows="generated"))):
        tokens = model.generate(x, max_new_tokens=4, min_length=12, do_sample=False)
        torch.testing.assert_close(model(x).logits, model(x).logits)
    assert (tokens[:, 9:] == 7).all()


@pytest.mark.parametrize("site", ["weights", "heads", "mlp"])
def test_row_policies(site: str):
    model, x = make("llama"), ids(1, 10)
    spans = Spans.of(system=(0, 2), image=[(3, 5), (6, 7)])
    expected = {
        "all": ([*range(10)], [10], [11]),
        "last": ([9], [10], [11]),
        "prefill": ([*range(10)], [], []),
        "generated": ([], [10], [11]),
        After("image"): ([7, 8, 9], [10], [11]),
        In("image"): ([3, 4, 6], [], []),
        In("generated"): ([], [10], [11]),
    }
    for rows, wanted in expected.items():
        got: list[list[int]] = []

        def note(y, at, got=got):
            got.append(at.rows.tolist())
            return y

        method = Edits(Edit(site, note, layers=[1], rows=rows))
        with regard.patch(model, method, spans=spans):
            model.generate(x, max_new_tokens=3, min_length=13, do_sample=False)
        assert got == [rows for rows in wanted if rows], rows


@torch.no_grad()
def test_rows_that_no_edit_touches_keep_their_values():
    model, x = make("llama"), ids(1, 12)
    with regard.patch(model, Causal()):
        plain = model(x).logits
    with regard.patch(model, Edits(Edit("weights", lambda y, at: 0 * y, rows="last"))):
        got = model(x).logits
    assert torch.equal(got[:, :11], plain[:, :11])
    assert not torch.allclose(got[:, 11], plain[:, 11])


@torch.no_grad()
def test_spans_of_one_call_of_the_model():
    model, x = make("llama"), ids(1, 8)
    seen = []

    def note(y, at):
        seen.append(at.spans.positions("text", 8).tolist())
        return y

    with regard.patch(model, Edits(Edit("weights", note, layers=[0]))):
        model(x, spans=Spans.of(text=(2, 4)))
        model(x, spans=Spans.of(text=(5, 8)))
    assert seen == [[2, 3], [5, 6, 7]]


def test_mistakes_get_one_line():
    model, x = make("llama"), ids(1, 8)
    with (
        pytest.raises(ValueError, match=r"Edit at 'heads': fn returned \(1, 8, 4, 4\), expected"),
        regard.patch(model, Edits(Edit("heads", lambda y, at: y[..., :4]))),
    ):
        model(x)
    with (
        pytest.raises(ValueError, match=r"fn returned NoneType"),
        regard.patch(model, Edits(Edit("weights", lambda y, at: None))),
    ):
        model(x)
    with (
        pytest.raises(ValueError, match=r"heads \[4\] do not fit a layer of 4 heads"),
        regard.patch(model, Edits(Edit("weights", lambda y, at: y, heads=[4]))),
    ):
        model(x)
    with (
        pytest.raises(ValueError, match=r"After\('image'\): no spans were declared"),
        regard.patch(model, Edits(Edit("heads", lambda y, at: y, rows=After("image")))),
    ):
        model(x)
    with (
        pytest.raises(ValueError, match=r"no span 'imag'; there are image, generated"),
        regard.patch(
            model,
            Edits(Edit("heads", lambda y, at: y, rows=After("imag"))),
            spans=Spans.of(image=(0, 2)),
        ),
    ):
        model(x)
    with pytest.raises(ValueError, match="site 'mlp' has no heads"):
        Edit("mlp", lambda y, at: y, heads=[1])
    with (
        pytest.raises(ValueError, match="has no part that regard knows as 'mlp'"),
        regard.patch(make("bert"), Edits(Edit("mlp", lambda y, at: y))),
    ):
        pass
    with (
        pytest.raises(ValueError, match="the model has no language-model head"),
        regard.patch(model.model, Edits(Edit("lm_logits", lambda y, at: y))),
    ):
        pass


def test_spans():
    spans = Spans.of(length=12, system=(0, 3), image=[(3, 5), (8, 9)], text=(9, 12))
    assert spans.names == ("system", "image", "text", "generated")
    assert spans.positions("image", 14).tolist() == [3, 4, 8]
    assert spans.positions("generated", 14).tolist() == [12, 13]
    assert spans.end("image") == 9
    assert Spans.of(image=(0, 2)).within(7).length == 7
    found = Spans.where(torch.tensor([1, 60, 60, 5, 60, 2]), image=60)
    assert found.ranges["image"] == ((1, 3), (4, 5)) and found.length == 6
    with pytest.raises(ValueError, match="a and b overlap at position 2"):
        Spans.of(a=(0, 3), b=(2, 5))
    with pytest.raises(ValueError, match="image ends at 9, the prompt at 8"):
        Spans.of(length=8, image=(3, 9))
    with pytest.raises(ValueError, match="the prompt's length is not known yet"):
        Spans.of(a=(0, 1)).positions("generated", 5)
    with pytest.raises(ValueError, match="is everything after the prompt"):
        Spans.of(generated=(1, 2))


@torch.no_grad()
def test_layers_as_a_function_of_the_depth():
    model, x = make("llama"), ids(1, 9)
    seen = []

    def note(y, at):
        seen.append(at.layer)
        return y

    upper = Edits(Edit("weights", note, layers=lambda depth: range(depth // 2, depth)))
    with regard.patch(model, upper):
        model(x)
    assert seen == [2, 3]
    beyond = Edits(Edit("resid", note, layers=lambda depth: [depth]))
    with (
        pytest.raises(ValueError, match=r"layers \[4\], but the model has 4"),
        regard.patch(model, beyond),
    ):
        pass


@torch.no_grad()
def test_a_row_whose_keys_are_all_taken_away_reads_nothing():
    model, x = make("llama"), ids(2, 9)

    def nothing(scores, at):
        return torch.full_like(scores, -torch.inf)

    edit = Edit("logits", nothing, layers=[1], rows="last")
    with regard.patch(model, Edits(edit)), regard.watch(model, SiteProbe("heads")) as seen:
        assert not model(x).logits.isnan().any()
    heads = seen.result()[0][1]
    assert not heads[:, -1].any() and heads[:, :-1].any()


@torch.no_grad()
def test_a_function_may_change_what_it_is_given():
    """In place or not: the model sees what is returned, observers are given copies."""
    model, x = make("llama"), ids(2, 9)
    expected = model(x).logits

    def double(y, at):
        return y.mul_(2)

    def twice(y, at):
        return y * 2

    for site in ("logits", "weights", "heads", "resid"):
        found = []
        for fn in (double, twice):
            with regard.patch(model, Edits(Edit(site, fn))):
                found.append(model(x).logits)
        assert torch.equal(*found)
        assert not torch.allclose(found[0], expected, atol=1e-4)
        with regard.watch(model, Spoiler(site)):
            torch.testing.assert_close(model(x).logits, expected, **TOLERANCE)


class Spoiler:
    """Observes, and spoils what it is given."""

    def __init__(self, site: str) -> None:
        self.edit = Edit(site, lambda y, at: y.zero_(), observes=True)

    def observers(self):
        return [self.edit]

    def result(self):
        return None


class Scaled(Method):
    """Hooks of its own: key projections of its layers, in decoding steps only."""

    def hooks(self, inside):
        self.steps = 0

        def scale(module, args, out):
            store = inside.passing().cache_store(inside.owner)
            store["passes"] = store.get("passes", 0) + 1
            if inside.passing().past == 0:
                return out
            self.steps += 1
            return 0.5 * out

        return [sites.core.k_proj.register_forward_hook(scale) for sites in inside.layers.values()]


@torch.no_grad()
def test_hooks_of_a_method():
    model, x = make("llama"), ids(1, 9)
    expected = model(x).logits
    cache = model(x[:, :8], use_cache=True).past_key_values
    method = Scaled()
    with regard.patch(model, method, layers=[1, 3]):
        torch.testing.assert_close(model(x).logits, expected)
        assert method.steps == 0
        stepped = model(x[:, 8:], past_key_values=cache).logits
    assert method.steps == 2
    assert not torch.allclose(stepped, expected[:, 8:], atol=1e-5)
    assert torch.equal(model(x).logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_that_fail_leave_nothing():
    class Broken(Method):
        def hooks(self, inside):
            raise ValueError("no router here")

    model = make("llama")
    with pytest.raises(ValueError, match="no router here"), regard.patch(model, Broken()):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation != "regard"
