"""The backbones: the authors' logits, parameter counts and names, shapes; the claim's commands."""

from __future__ import annotations

import pytest
import torch
from benchmarks import biformer as benchmark

from regard.sparse.biformer import BiLevelRoutingAttention
from regard.sparse.biformer_model import BiFormer, BiFormerBlock, Variant, biformer

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}
SMALL = Variant((1, 1, 2, 1), (16, 32, 48, 64), 0.0, (1, 2, 3, None), 2, 2.0, 16)

# The authors' BiFormer (models/biformer.py at 1697bbb) with this variant's sizes, the weights of
# `published` and the image of the test below, in float64.
LOGITS = [
    2.7152701865655233,
    8.41101065804083,
    2.543585185418676,
    -6.931744254612951,
    -6.943580607913706,
]


def published(model):
    """Weights under the names of the published files, made of sines."""
    state = {}
    for name, x in model.state_dict().items():
        old = name.replace("qkv_linear", "qkv.qkv").replace("output_linear", "wo")
        state[old] = torch.zeros_like(x[:, :, 0, 0] if old != name and x.dim() == 4 else x)
    for at, (name, x) in enumerate(sorted(state.items())):
        if not x.dtype.is_floating_point:
            continue
        step = 0.7 + 0.01 * at
        wave = torch.sin(torch.arange(1, x.numel() + 1, dtype=torch.float64) * step).view(x.shape)
        if name.endswith("running_var"):
            wave = 1 + wave / 2
        elif x.dim() > 1:
            wave = wave * (3 / x[0].numel()) ** 0.5
        elif "norm" in name and name.endswith("weight"):
            wave = 1 + wave / 2
        x.copy_(wave)
    return state


@torch.no_grad()
def test_published_names_load_and_give_the_authors_logits():
    model = BiFormer(SMALL, classes=5).double().eval()
    state = published(model)
    before = set(state)
    assert any(name.endswith("attn.qkv.qkv.weight") for name in state)
    model.load_state_dict(state)
    assert set(state) == before
    at = torch.arange(3 * 64 * 64, dtype=torch.float64)
    x = torch.sin(at * 0.37).view(1, 3, 64, 64)
    x = x + torch.cos(torch.arange(64, dtype=torch.float64) * 0.11)
    want = torch.tensor([LOGITS], dtype=torch.float64)
    torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
    # and it loads what it saves
    again = BiFormer(SMALL, classes=5).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_missing_weight_is_still_missing():
    module = BiLevelRoutingAttention(8)
    state = module.state_dict()
    del state["qkv_linear.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv_linear\.weight"):
        module.load_state_dict(state)


@pytest.mark.parametrize(("variant", "millions"), [("tiny", 13.1), ("small", 25.5), ("base", 56.8)])
def test_parameters_are_as_many_as_published(variant, millions):
    with torch.device("meta"):
        model = biformer(variant)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1) == millions


@torch.no_grad()
def test_maps_and_logits_of_an_image_that_regions_do_not_divide():
    model = biformer("tiny", classes=7).eval()
    x = torch.randn(1, 3, 116, 100, generator=torch.Generator().manual_seed(0))
    shapes = [tuple(y.shape[1:]) for y in model.maps(x)]
    assert shapes == [(64, 29, 25), (128, 15, 13), (256, 8, 7), (512, 4, 4)]
    out = model(x)
    assert out.shape == (1, 7) and torch.isfinite(out).all()
    with pytest.raises(ValueError, match="smaller than n_win = 7"):
        model(x[..., :96])


def test_stochastic_depth_leaves_out_branches_in_training_only():
    torch.manual_seed(0)
    block = BiFormerBlock(8, heads=2, topk=2, n_win=2, drop_path=0.5)
    x = torch.randn(64, 8, 4, 4)
    start = x + block.pos_embed(x)
    kept = [(y - s).abs().amax() > 0 for y, s in zip(block(x), start, strict=True)]
    assert 0.5 < sum(kept) / 64 < 0.95
    block.eval()
    assert torch.equal(block(x), block(x))
    with pytest.raises(ValueError, match="drop_path must lie in"):
        BiFormerBlock(8, drop_path=1.0)


def test_a_small_model_learns():
    torch.manual_seed(0)
    model = BiFormer(SMALL, classes=2)
    x = torch.randn(16, 3, 32, 32)
    x[8:, 0] += 1
    y = torch.arange(16) // 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(p.grad is not None for p in model.parameters())


def test_unknown_sizes_are_named():
    with pytest.raises(ValueError, match="one of tiny, small, base, got 'huge'"):
        biformer("huge")


def test_work_grows_as_stated_with_the_best_number_of_regions():
    (row,) = benchmark.growth((16, 128))
    assert set(row) == COLUMNS and "grows as N^1.333 with S = 8, 32" in row["note"]
    # routing, and scores and read-out of k of S^2 regions
    assert benchmark.work(16, 4, 3) == 4**4 + 2 * 256 * 256 * 3 // 16


def test_multiplications_of_the_published_sizes():
    (row,) = benchmark.flops(sizes=("tiny",))
    assert row["note"] == "2.21 G, published 2.2 G"


def test_windows_do_not_reach_what_the_task_asks_for():
    ids, marked, answer = benchmark.batch(50, 16, 4, torch.Generator().manual_seed(0))
    assert (marked.sum((1, 2)) == 1).all() and not marked[:, :4, :4].any()
    assert torch.equal(ids[marked], answer) and (ids[:, 0, 0] == benchmark.CLASSES).all()
    kinds = (benchmark.BiLevelRoutingAttention, 16, True), (benchmark.OwnRegion, 1, False)
    for kind, topk, reached in kinds:
        torch.manual_seed(0)
        model = benchmark.Corner([kind(16, 1, 4, topk) for _ in range(2)], 16)
        marked = torch.zeros(1, 16, 16, dtype=torch.bool)
        before = model(ids[:1], marked)
        marked[0, 10, 10] = True
        assert torch.equal(model(ids[:1], marked), before) != reached
