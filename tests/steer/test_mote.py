"""MoTE against routing written out, and in tiny mixture-of-experts models."""

from __future__ import annotations

import pytest
import torch
from benchmarks import mote as benchmark
from tests.models.tiny import ids, left_padding
from tests.models.tiny import make as make_tiny
from tests.steer.tiny_moe import KINDS, make

import regard
from regard.models import HeadMask
from regard.steer.act import ACT
from regard.steer.mote import TunedExperts
from regard.steer.mote_resonance import find_routers, routing_map
from regard.steer.mote_route import route

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def written_out(row, top_k, off, on, mode, norm):
    """One token's weights by expert."""
    able = [e for e in range(len(row)) if mode == "drop" or e not in off]
    whole = sum(torch.tensor(row[e]).double().exp() for e in able)
    share = {e: float(torch.tensor(row[e]).double().exp() / whole) for e in able}
    rest = sorted((e for e in able if e not in on), key=lambda e: -share[e])
    kept = [*on, *rest[: top_k - len(on)]]
    weights = {e: share[e] for e in kept if e not in off}
    total = sum(weights.values()) if norm else 1.0
    return [weights.get(e, 0.0) / (total or 1.0) for e in range(len(row))]


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("off", "on"), [((), ()), ((1, 3), ()), ((), (5, 0)), ((2,), (4,))])
def test_is_the_routing_written_out(mode, norm, off, on):
    logits = 2 * torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).double()
    weights, indices = route(logits, 3, off=off, on=on, mode=mode, norm=norm)
    got = torch.zeros(40, 7).double().scatter_add(1, indices, weights)
    want = [written_out(row, 3, off, on, mode, norm) for row in logits.tolist()]
    torch.testing.assert_close(got, torch.tensor(want).double())
    assert (got[:, list(off)] == 0).all() and (got[:, list(on)] > 0).all()
    if norm:
        torch.testing.assert_close(got.sum(-1), torch.ones(40).double())


def test_token_without_experts_gets_nothing():
    weights, _ = route(torch.tensor([[3.0, 2.0, 0.0, 0.0]]), 2, off=[0, 1])
    assert torch.equal(weights, torch.zeros(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_in_a_model_it_is_the_routing(kind, mode):
    for norm in (True, False):
        model, x = make(kind, norm), ids(2, 12)
        block = model.model.layers[2].mlp
        seen = []
        handle = block.register_forward_hook(lambda m, a, o, seen=seen: seen.append((a[0], o)))
        before = model(x).logits
        seen.clear()
        with regard.patch(model, TunedExperts()):
            plain = model(x).logits
        with regard.patch(model, TunedExperts([(2, 1), (2, 3)], [(2, 0)], mode)):
            steered = model(x).logits
        handle.remove()
        hidden, out = seen[1]
        assert torch.equal(hidden, seen[0][0])  # nothing below layer 2 is touched
        flat = hidden.flatten(0, 1)
        logits = flat @ block.gate.weight.T
        weights, at = route(logits, 2, off=[1, 3], on=[0], mode=mode, norm=norm)
        torch.testing.assert_close(out.flatten(0, 1), block.experts(flat, at, weights))
        assert not torch.allclose(steered, plain, atol=1e-2)
        assert torch.equal(model(x).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_identities(kind):
    model, x = make(kind), ids(2, 12)
    plain = model(x).logits
    with regard.patch(model, TunedExperts()):
        torch.testing.assert_close(model(x).logits, plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        find_routers(model)[2].weight[4] = 0
        find_routers(model)[2].weight[3] = 1e4 * find_routers(model)[2].weight[5]
        find_routers(model)[2].weight[2] = -find_routers(model)[2].weight[3]
    plain, used = model(x).logits, routing_map(model, x, counts=True).sum(0)
    never = [(2, e) for e in range(6) if used[2, e] == 0]
    always = [(2, e) for e in range(6) if used[2, e] == 24]
    assert never or always
    for mode in ("drop", "mask"):
        with regard.patch(model, TunedExperts(never, always, mode)):
            torch.testing.assert_close(model(x).logits, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_cached_is_uncached_padding_and_restoring(kind, mode):
    model, x = make(kind), ids(2, 12)
    before = model(x).logits
    off, on = [(0, 1), (2, 2)], [(2, 5)]
    method = TunedExperts(off, on, mode)
    with regard.patch(model, method):
        whole = model(x).logits
        out = model(x[:, :8], use_cache=True)
        parts = [out.logits]
        for t in range(8, 12):
            parts.append(model(x[:, t : t + 1], past_key_values=out.past_key_values).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
        mask = left_padding(2, 12, 3)
        both = model.generate(x, attention_mask=mask, **GREEDY)
        alone = model.generate(x[1:, 3:], **GREEDY)
        assert torch.equal(both[1, 3:], alone[0])
    assert not torch.allclose(whole, before, atol=1e-3)
    assert torch.equal(model(x).logits, before)
    with pytest.raises(RuntimeError, match="in the middle"), regard.patch(model, method):
        model(x)
        raise RuntimeError("in the middle")
    assert torch.equal(model(x).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modes", [("drop", "drop"), ("mask", "mask"), ("drop", "mask")])
def test_several_switch_together(kind, modes):
    """One patch of two, nested patches, and either order switch what one method would, and a layer
    left out of the patch is left alone."""
    model, x = make(kind), ids(2, 12)
    before = model(x).logits
    one = TunedExperts([(0, 1), (2, 2)], mode=modes[0])
    two = TunedExperts([(2, 3)], [(0, 5)], modes[1])
    with regard.patch(model, one, two):
        got, maps = model(x).logits, routing_map(model, x)
    assert not maps[:, 0, 1].any() and not maps[:, 2, 2:4].any() and maps[:, 0, 5].all()
    with regard.patch(model, two), regard.patch(model, one):
        assert torch.equal(model(x).logits, got)
    if modes[0] == modes[1]:
        with regard.patch(model, TunedExperts([*one.off, *two.off], two.on, modes[0])):
            assert torch.equal(model(x).logits, got)
    with regard.patch(model, one):
        alone = model(x).logits
        with regard.patch(model, two):
            assert not torch.allclose(model(x).logits, alone, atol=1e-3)
        assert torch.equal(model(x).logits, alone)
    with regard.patch(model, one, layers=[0]):
        narrow = model(x).logits
    with regard.patch(model, TunedExperts([(0, 1)], mode=modes[0])):
        assert torch.equal(model(x).logits, narrow)
    first, second = regard.patch(model, one), regard.patch(model, two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # left out of order, the other stays
    with regard.patch(model, TunedExperts()):
        rest = model(x).logits
    second.__exit__(None, None, None)
    with regard.patch(model, two):
        assert torch.equal(model(x).logits, rest)
    assert torch.equal(model(x).logits, before)


@torch.no_grad()
def test_composes_with_other_sites():
    model, x = make(), ids(2, 12)
    method, heads = TunedExperts([(0, 1), (2, 2)]), HeadMask([(0, 1), (2, 3)])
    with regard.patch(model, heads):
        plain = model(x).logits
    with regard.patch(model, heads, method):
        both, maps = model(x).logits, routing_map(model, x)
    with regard.patch(model, method, heads):
        assert torch.equal(model(x).logits, both)
    assert not maps[:, 0, 1].any() and not torch.allclose(both, plain, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_beams_are_uncached_beams(mode):
    model, x = make("olmoe"), ids(2, 8)
    beams = {**GREEDY, "num_beams": 3}
    plain = model.generate(x, **beams)
    with regard.patch(model, TunedExperts([(0, 1), (1, 4), (2, 2)], mode=mode)):
        got = model.generate(x, **beams)
        assert torch.equal(got, model.generate(x, use_cache=False, **beams))
    assert not torch.equal(got, plain)


def test_file(tmp_path):
    path = tmp_path / "experts.safetensors"
    for method in (TunedExperts([(0, 1), (2, 3)], [(1, 5)], "mask"), TunedExperts()):
        method.save(path)
        assert TunedExperts.load(path) == method
    ACT(heads=[(0, 1)]).save(path)
    with pytest.raises(ValueError, match=r"was not written by TunedExperts\.save"):
        TunedExperts.load(path)


def test_cost_is_the_plain_models():
    notes = [r["note"] for r in benchmark.growth((16, 32, 64))]
    assert all("N^1.00" in note and "1.00 times" in note for note in notes)


def entered(model, **options):
    with regard.patch(model, TunedExperts(**options)):
        pass


def conflict():
    model = make()
    with (
        regard.patch(model, TunedExperts([(0, 1)])),
        regard.patch(model, TunedExperts(on=[(0, 1)])),
    ):
        pass


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: entered(make(), off=[(1, 0)]), r"layers \[1\] have no router"),
        (lambda: entered(make(), off=[(0, 6)]), r"experts \[6\]"),
        (lambda: entered(make(), off=[(0, 1)], on=[(0, 1)]), "both on and off"),
        (lambda: entered(make(), on=[(0, 1), (0, 2), (0, 3)]), "do not fit that"),
        (lambda: entered(make(), off=[(0, 1)], mode="cut"), "mode must be one of"),
        (lambda: entered(make_tiny("llama")), "LlamaModel has no top-k router"),
        (conflict, "both on and off"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
