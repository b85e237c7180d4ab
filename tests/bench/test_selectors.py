"""What the benchmarks of the fourteen selectors count and train, and the commands of their tables."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from benchmarks import biformer, combiner, dma, longheads, sparsifiner
from benchmarks.tiny_letters import letters_loss
from torch import nn

from regard import Causal, SlidingWindow
from regard.sparse.dma import DynamicMaskAttention
from regard.sparse.sparsifiner import SparsifinerAttention
from regard.sparse.sparsifiner_keys import sparse_basis, sparse_coefficients

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}
TABLES = Path(__file__).parents[2] / "benchmarks" / "selectors.md"
KEYS = (
    *("hip", "seer", "tidaldecode", "hylra", "moa", "longheads", "landmark", "cca", "routing"),
    *("combiner", "hyper", "dma", "sparsifiner", "biformer"),
)


@torch.no_grad()
def test_sparsifiners_product_counts_pairs_that_are_both_not_zero():
    n, width = 50, 16
    torch.manual_seed(0)
    layer = SparsifinerAttention(width, n, 1)
    predictor = layer.mask_predictor
    predictor.proj_back_n.mul_(0.02 / 0.0135)
    q, k, _ = layer.heads_of(torch.randn(1, n, width))
    found = sparse_coefficients(predictor.coefficients(q, k))[0, 0]
    basis = sparse_basis(predictor.proj_back_n)
    pairs = sum(int(((row != 0) & (basis != 0)).sum()) for row in found)
    assert 0 < pairs < (n - 1) * n * 8
    assert sparsifiner.work(n, width)["product"] == pairs


def test_sparsifiners_coefficients_cost_the_same_without_storage():
    (row,) = sparsifiner.growth_predictor((6, 14), 64)
    small, large = (sparsifiner.work(n)["low rank"] for n in (37, 197))
    assert f"low rank N^{math.log(large / small) / math.log(197 / 37):.2f}" in row["note"]
    assert row["note"].endswith(f"{large / (2 * 197**2 * 64):.3f} of dense attention at the end")
    assert set(row) == COLUMNS


@pytest.mark.parametrize(("side", "topk"), [(12, 4), (48, 4), (30, 1), (20, 16)])
def test_biformers_best_number_of_regions_is_the_cheapest_that_divides(side, topk):
    # routing compares all regions; scores and read-out are k of S^2 regions
    costs = {
        s: s**4 + 2 * side**4 * topk // s**2
        for s in range(1, side + 1)
        if side % s == 0 and s * s >= topk
    }
    regions, cost = biformer.best(side, topk)
    assert cost == min(costs.values()) == costs[regions]


def test_longheads_counts_the_features_that_it_scores():
    (row,) = longheads.growth((1024, 2048))
    # rows from 512 on, against every chunk of 64 of the prompt
    scored = [(n - 512) * (n // 64) for n in (1024, 2048)]
    assert f"scored features N^{math.log2(scored[1] / scored[0]):.2f}" in row["note"]


@torch.no_grad()
def test_dmas_layer_is_the_layer_and_turning_counts_distances_alone():
    torch.manual_seed(0)
    layer, x = DynamicMaskAttention(16, 2, 1, 4), torch.randn(1, 12, 16)
    torch.testing.assert_close(dma._Layer(layer, None, False)(x), layer(x))
    # a window of one key reads the token itself, wherever it stands
    own = Causal() & SlidingWindow(0)
    still, turned = (dma._Layer(layer, own, rotary)(x) for rotary in (False, True))
    torch.testing.assert_close(turned, still)
    still, turned = (dma._Layer(layer, Causal(), rotary)(x) for rotary in (False, True))
    torch.testing.assert_close(turned[:, 0], still[:, 0])
    assert not torch.allclose(turned[:, 1:], still[:, 1:])


class _Zero(nn.Module):
    """Attention that reads nothing: what is left are pairs of characters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_letters_are_learnt_and_repeat():
    how = {"length": 32, "batch": 8, "held_out": 32}
    first, later, again = (
        letters_loss(lambda _: _Zero(), steps=steps, **how) for steps in (5, 60, 60)
    )
    assert later == again and later < first - 0.5
    assert 2.0 < later < math.log(128)


def test_letters_report_every_attention():
    rows = [*dma.letters(8, steps=2, length=16), *combiner.letters(8, steps=2, length=16)]
    assert len(rows) == 5
    assert all(set(r) == COLUMNS and "nats a character after 2 steps" in r["note"] for r in rows)


def _commands() -> list[str]:
    return re.findall(
        r"`(?:python -m benchmarks\.)?(\w+(?: --\w+(?: [a-z_]+)?)+)`", TABLES.read_text()
    )


def test_every_selector_has_a_command_in_both_tables():
    claims, growth = TABLES.read_text().split("## Growth")
    for key in KEYS:
        assert f"| {key} |" in claims and f"| {key} |" in growth
        assert any(command.startswith(f"{key} ") for command in _commands())


@pytest.mark.parametrize("command", sorted(set(_commands())))
def test_commands_of_the_tables_exist(command):
    key, *rest = command.split()
    module = importlib.import_module(f"benchmarks.{key}")
    source = inspect.getsource(module)
    main = source.split('if __name__ == "__main__":')[1]
    flags = [x[2:] for x in rest if x.startswith("--") and x != "--only"]
    for flag in flags:
        assert f'"{flag}": ' in main
    if "--only" in rest:
        only = rest[rest.index("--only") + 1]
        assert [x for x in re.findall(r"[a-z_0-9]+", main) if only in x and hasattr(module, x)]
