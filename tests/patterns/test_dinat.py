"""NAT and DiNAT: loops over neighbours, published sizes, transformers' model, receptive fields."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from regard.patterns.dinat import (
    VARIANTS,
    DilatedNeighborhoodAttention,
    DiNAT,
    DiNATLayer,
    Variant,
    dinat,
)
from regard.patterns.fna import na_av, na_qk
from regard.patterns.neighborhood import Neighborhood

from .test_neighborhood import axis_keys


@pytest.mark.parametrize("window, dilation", [((3, 3), (2, 2)), ((5, 3), (1, 2)), ((3, 1), (1, 3))])
def test_equals_loops_over_neighbours_in_float64(window, dilation):
    torch.manual_seed(0)
    module = DilatedNeighborhoodAttention(8, 2, window, dilation).double()
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(1, 7, 6, 8, dtype=torch.float64)
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias)[0].view(7, 6, 3, 2, 4).unbind(2)
    out = torch.zeros(7, 6, 8, dtype=torch.float64)
    for r in range(7):
        for c in range(6):
            rows = sorted(axis_keys(7, r, window[0], 1, dilation[0], False))
            cols = sorted(axis_keys(6, c, window[1], 1, dilation[1], False))
            for h in range(2):
                scores, values = [], []
                for y in rows:
                    for z in cols:
                        down = y // dilation[0] - r // dilation[0] + window[0] - 1
                        right = z // dilation[1] - c // dilation[1] + window[1] - 1
                        scores.append(q[r, c, h] @ k[y, z, h] / 2 + module.rpb[h, down, right])
                        values.append(v[y, z, h])
                weights = torch.stack(scores).softmax(0)
                out[r, c, 4 * h : 4 * h + 4] = weights @ torch.stack(values)
    want = out @ module.proj.weight.T + module.proj.bias
    torch.testing.assert_close(module(x)[0], want)


def reach(length, k, dilations):
    """Positions that the middle one depends on, by products of the layers' masks."""
    seen = torch.eye(length)
    for d in dilations:
        seen = (seen @ Neighborhood((length,), k, dilation=d).dense(length).float() > 0).float()
    return int(seen[length // 2].sum())


def test_receptive_fields_of_the_paper():
    """k = 3: dilations 1, 3, 9, 27 see 3, 9, 27, 81 positions, four plain layers 9 (table 1)."""
    assert [reach(243, 3, (1, 3, 9, 27)[: n + 1]) for n in range(4)] == [3, 9, 27, 81]
    assert reach(243, 3, (1, 1, 1, 1)) == 9
    assert [reach(400, 7, (1, 7)), reach(400, 7, (1, 1))] == [49, 13]


def test_cost_grows_linearly_and_not_with_the_dilation():
    sides = (28, 56, 112, 224)
    for dilation in (1, 4):
        listed = [
            Neighborhood((s, s), 7, dilation=dilation).layout(s * s, block=(128, 64)).listed_pairs()
            for s in sides
        ]
        slope = math.log(listed[-1] / listed[1]) / math.log(sides[-1] ** 2 / sides[1] ** 2)
        assert slope < 1.1
    # Scores of the unfused form: N k^2, whatever the dilation.
    q = torch.zeros(1, 28, 28, 1, 4)
    assert {na_qk(q, q, 7, d).numel() for d in (1, 2, 4)} == {28 * 28 * 49}


@pytest.mark.parametrize(
    "name, millions",
    [
        ("nat_mini", 20),
        ("nat_tiny", 28),
        ("nat_small", 51),
        ("nat_base", 90),
        ("dinat_mini", 20),
        ("dinat_tiny", 28),
        ("dinat_small", 51),
        ("dinat_base", 90),
        ("dinat_large", 200),
        ("dinat_large_384", 200),
    ],
)
def test_sizes_of_the_papers(name, millions):
    """Tables of arXiv 2204.07143 and 2209.15001."""
    with torch.device("meta"):
        model = dinat(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    assert ("levels.0.blocks.0.gamma1" in model.state_dict()) == (name in ("nat_small", "nat_base"))
    spread = [layer.attn.dilation for level in model.levels for layer in level.blocks]
    assert set(spread) == {1, *VARIANTS[name].dilations}


TINY = Variant((2, 3), 16, (2, 4), 2.0, 0.1, 0.5, (2, 1))
OFFICIAL = (
    ("patch_embed.proj", "dinat.embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "dinat.embeddings.norm"),
    ("levels", "dinat.encoder.levels"),
    ("blocks", "layers"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.rpb", "attention.self.rpb"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("head", "classifier"),
)


def their_weights(model):
    """Our weights under transformers' names."""
    found = {}
    for name, value in model.state_dict().items():
        for ours, theirs in OFFICIAL:
            if name.startswith(ours) or f".{ours}" in name:
                name = name.replace(ours, theirs)
        if name.startswith("norm"):
            name = f"dinat.layernorm.{name.split('.')[1]}"
        if ".attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.self.{part}")] = rows
        elif ".gamma" in name:
            found.setdefault(f"{name[:-7]}.layer_scale_parameters", []).append(value)
        else:
            found[name] = value
    return {k: torch.stack(v) if isinstance(v, list) else v for k, v in found.items()}


def test_transformers_has_the_same_model(monkeypatch):
    """Its DiNAT needs a natten that is gone, so its two kernels are ours; all the rest is theirs.

    It hands them (B, Y, X, H, D), which that natten would have read as (B, H, Y, X, D).
    """
    monkeypatch.setattr("transformers.utils.is_natten_available", lambda: False)
    theirs = import_module("transformers.models.dinat.modeling_dinat")

    def heads_last(x):
        return x.transpose(1, 2)

    monkeypatch.setattr(theirs, "requires_backends", lambda *_: None)
    monkeypatch.setattr(
        theirs,
        "natten2dqkrpb",
        lambda q, k, rpb, w, d: na_qk(heads_last(q), heads_last(k), w, d, scale=1.0, rpb=rpb),
    )
    monkeypatch.setattr(
        theirs,
        "natten2dav",
        lambda p, v, w, d: na_av(p, heads_last(v), w, d).permute(0, 3, 1, 2, 4),
    )
    torch.manual_seed(0)
    ours = DiNAT(TINY, classes=5, window=3).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = theirs.DinatConfig(
        embed_dim=16,
        depths=[2, 3],
        num_heads=[2, 4],
        kernel_size=3,
        dilations=[[1, 2], [1, 1, 1]],
        mlp_ratio=2.0,
        layer_scale_init_value=0.5,
        num_labels=5,
    )
    other = theirs.DinatForImageClassification(config).eval()
    other.load_state_dict(their_weights(ours))
    image = torch.randn(2, 3, 36, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), other(image).logits, rtol=1e-4, atol=1e-5)


def test_training_and_dropout():
    torch.manual_seed(0)
    model = DiNAT(TINY, classes=5, window=3)
    image = torch.randn(2, 3, 32, 32)
    model(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    layer = DiNATLayer(8, 2, 3, drop_path=0.5)
    x = torch.randn(64, 4, 4, 8)
    kept = (layer(x) != x).flatten(1).any(1)
    assert 30 < kept.sum() < 64
    assert (layer.eval()(x) != x).flatten(1).any(1).all()


def test_bad_input_is_named():
    for call, words in (
        (lambda: dinat("dinat_huge"), "variant must be one of nat_mini, .*got 'dinat_huge'"),
        (lambda: DilatedNeighborhoodAttention(8, 2, 4), "needs odd windows"),
        (lambda: DilatedNeighborhoodAttention(8, 2, 3, causal=True), "no causal axis"),
        (lambda: DiNATLayer(8, 2, 3, drop_path=1.0), r"\[0, 1\), got 1.0"),
        (lambda: dinat()(torch.zeros(1, 3, 64, 64)), "larger than the 16 positions"),
        (
            lambda: DilatedNeighborhoodAttention(8, 2, 3, 4)(torch.zeros(1, 16, 9, 8)),
            "window 3 times dilation 4 is larger than the 9",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
