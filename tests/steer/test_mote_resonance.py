"""Which experts resonate with a behaviour: routing maps of tiny models, and a planted expert."""

from __future__ import annotations

import pytest
import torch
from tests.models.tiny import ids, left_padding
from tests.models.tiny import make as make_tiny
from tests.steer.tiny_moe import KINDS, make

import regard
from regard.steer.mote import TunedExperts
from regard.steer.mote_resonance import (
    behaviour_score,
    find_routers,
    resonance_table,
    routing_map,
)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_map_sums_what_the_router_gives(kind):
    model, x = make(kind), ids(2, 12)
    found, counts = routing_map(model, x), routing_map(model, x, counts=True)
    dense = [1] if kind == "qwen3_moe" else []
    layers = [at for at in range(3) if at not in dense]
    torch.testing.assert_close(found[:, layers].sum(-1), torch.full((2, len(layers)), 12.0))
    assert (counts[:, layers].sum(-1) == 24).all() and not found[:, dense].any()
    mask = left_padding(2, 12, 4)
    padded = routing_map(model, {"input_ids": x, "attention_mask": mask})
    alone = routing_map(model, x[1:, 4:])
    torch.testing.assert_close(padded[1], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded[0], found[0])


@torch.no_grad()
def test_planted_expert_ranks_first_and_can_be_switched_off():
    """Expert (0, 4) is made to like token 9's hidden state; prompts with token 9 are the behaviour."""
    model = make("olmoe")
    seen = []
    router = find_routers(model)[0]
    handle = router.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(torch.tensor([[9]]))
    handle.remove()
    router.weight[4] = 3 * seen[0][0] / seen[0][0].norm()
    x = ids(8, 10, seed=3)
    x[x == 9] = 11
    x[:4, 5:] = 9
    labels = torch.arange(8) < 4
    maps = routing_map(model, x)
    for kind in ("difference", "ratio"):
        score = behaviour_score(maps, labels, kind)
        assert resonance_table(score[:1], 1).rows[0][:2] == (0, 4)
    assert resonance_table(behaviour_score(maps, labels), 1).rows[0][:2] == (0, 4)
    for mode in ("drop", "mask"):
        with regard.patch(model, TunedExperts([(0, 4)], mode=mode)):
            assert routing_map(model, x)[:, 0, 4].max() == 0
    with regard.patch(model, TunedExperts(on=[(0, 1)])):
        assert (routing_map(model, x, counts=True)[:, 0, 1] == 10).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: routing_map(make_tiny("llama"), ids(1, 4)), "no top-k router"),
        (
            lambda: behaviour_score(torch.ones(2, 1, 3), torch.ones(2).bool(), "x"),
            "kind must be one",
        ),
        (
            lambda: behaviour_score(torch.ones(2, 3), torch.ones(2).bool()),
            r"maps must be \(P, L, E\)",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
