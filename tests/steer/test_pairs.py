"""Any two steering methods that touch different sites compose, and leave the model as it was."""

from __future__ import annotations

from importlib import import_module
from itertools import combinations

import pytest
import torch
from tests.models.tiny import ids, make
from tests.steer.tiny_moe import make as make_mixture
from torch import nn

import regard
from regard.bench.steer_names import build, known
from regard.catalog import find
from regard.models import Method, Spans
from regard.steer.agla import AGLA
from regard.steer.alora_model import ALoRAAdapters

# What methods need that have no default: numbers that fit the tiny model.
NEEDED = {
    "mote": ["off=[(0, 1), (2, 4)]", "on=[(2, 0)]"],
    "var": ["dims=(3,)", "tau=1.0"],
}
# What a method's own hooks change, where it has any.
HOOKED = {"agla": "output", "alora": "projections", "mote": "router"}
KNOWN = {row["name"]: row for row in known()}
SPANS = Spans.of(20, image=(4, 8), text=(8, 14), documents=[(1, 3), (3, 4)])


def made(name: str, model) -> Method | None:
    """The method, or ``None`` for one that needs tensors of its own."""
    if name == "agla":
        hidden = (torch.arange(20) < 3) | (torch.arange(20) > 5)
        masked = {"input_ids": ids(1, 20), "attention_mask": hidden[None].long()}
        return AGLA(model, masked, 1.0, 0.1)
    if name == "alora":
        torch.manual_seed(0)
        adapters = ALoRAAdapters.of(model, r=4)
        for adapter in adapters.adapters:
            nn.init.normal_(adapter.B.weight, std=0.3)
        return adapters
    row = KNOWN[name]
    needed = {key for key, default in row["settings"].items() if default is None}
    if needed == {"model"}:
        module, _, kind = find(name).card.entry.partition(":")
        return getattr(import_module(module), kind)(model)
    if needed and name not in NEEDED:
        return None
    return build(name, NEEDED.get(name, []))


def sites(name: str, method: Method) -> set[str]:
    """What a method reads or changes: sites of its edits, its hooks, the mask, the attention itself."""
    found = {edit.site for edit in method.edits()}
    kind = type(method)
    found |= {HOOKED[name]} if kind.hooks is not Method.hooks else set()
    found |= {"mask"} if kind.mask is not Method.mask else set()
    return found | ({"attend"} if kind.attend is not Method.attend else set())


# Computing attention anew, weights and logits are one place: what a row's weights are.
WEIGHTS = {"attend", "weights", "logits", "mask"}


def apart(first: set[str], second: set[str]) -> bool:
    first, second = (x | (WEIGHTS if x & WEIGHTS else set()) for x in (first, second))
    return not first & second


def test_most_methods_are_in_it():
    model = make("llama")
    there = [name for name in KNOWN if made(name, model) is not None]
    assert len(there) >= 8, there


@pytest.mark.parametrize(("first", "second"), list(combinations(KNOWN, 2)))
@torch.no_grad()
def test_pair(first, second):
    mixture = "mote" in (first, second)
    model, x = make_mixture("olmoe", depth=4) if mixture else make("llama"), ids(1, 20)
    pair = [made(name, model) for name in (first, second)]
    if None in pair:
        # It needs tensors, which its own tests make.
        needy = KNOWN[(first, second)[pair.index(None)]]
        assert None in needy["settings"].values()
        return
    plain = model(x).logits
    for order in (pair, pair[::-1]):
        try:
            with regard.patch(model, *order, spans=SPANS):
                out = model.generate(x, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        except ValueError:
            touched = map(sites, (first, second), pair)
            assert not apart(*touched), "they touch different sites"
        else:
            assert out.shape == (1, 23)
        assert torch.equal(model(x).logits, plain)
