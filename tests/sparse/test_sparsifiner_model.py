"""The image transformer against `transformers`, the losses against their formulas, and training."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarks import sparsifiner as benchmark
from transformers import ViTConfig, ViTForImageClassification

from regard.sparse.sparsifiner_model import Output, Sparsifiner
from regard.sparse.sparsifiner_train import distillation_loss, reconstruction_loss

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}
SIZES = {"image": 16, "patch": 4, "dim": 24, "depth": 2, "heads": 3, "classes": 5}


def small(**options):
    torch.manual_seed(0)
    return Sparsifiner(**SIZES, reduce_n=3, **options)


def images(size=2, seed=0):
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def of_transformers(theirs, model):
    """The weights of a `transformers` vision transformer under DeiT's names; predictors stay."""
    of, found = theirs.state_dict(), {}
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
    }
    for name, x in model.state_dict().items():
        if "mask_predictor" in name:
            found[name] = x
            continue
        if ".attn.qkv." in name:
            layer, kind = name.split(".")[1], name.split(".")[-1]
            parts = (f"vit.layers.{layer}.attention.{one}_proj.{kind}" for one in "qkv")
            found[name] = torch.cat([of[part] for part in parts])
            continue
        old = names.get(name, name)
        for ours, other in (
            ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            ("blocks.", "vit.layers."),
            ("attn.proj", "attention.o_proj"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("head", "classifier"),
        ):
            old = old.replace(ours, other)
        found[name] = of["vit.layernorm" + old[4:] if old.startswith("norm.") else old]
    return found


@pytest.mark.parametrize("keep", [1.0, 0.25])
@torch.no_grad()
def test_its_dense_form_is_the_vision_transformer_of_transformers(keep):
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        num_labels=5,
        layer_norm_eps=1e-6,
        attn_implementation="eager",
    )
    theirs = ViTForImageClassification(config).eval().double()
    model = small(keep=keep).double()
    model.load_state_dict(of_transformers(theirs, model))
    x = images().double()
    want = theirs(x, output_attentions=True)
    got = model.reconstruct(x)
    torch.testing.assert_close(got.logits, want.logits)
    for a, b in zip(got.attentions, want.attentions, strict=True):
        torch.testing.assert_close(a, b)
    sparse = model(x)
    assert torch.allclose(sparse.logits, want.logits) == (keep == 1.0)
    assert sparse.tokens.shape == (2, 16, 24) and sparse.scores == sparse.attentions == []


def test_parameters_part_into_predictors_and_backbone():
    model = small()
    split = [*model.predictors()], [*model.backbone()]
    assert len(split[0]) == 2 * 6
    assert {id(p) for part in split for p in part} == {id(p) for p in model.parameters()}
    assert sum(map(len, split)) == len([*model.parameters()])
    with torch.device("meta"):
        deit_small = Sparsifiner()
    # DeiT-S has 22.05 million
    assert sum(p.numel() for p in deit_small.backbone()) == 22_050_664


def test_losses_are_their_formulas():
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 3, 4, 5, generator=g) for _ in range(2)]
    attentions = [torch.rand(2, 3, 5, 5, generator=g).requires_grad_() for _ in range(2)]
    want = sum(
        (s[b, h, i] - a[b, h, i + 1]).square().sum()
        for s, a in zip(scores, attentions, strict=True)
        for b in range(2)
        for h in range(3)
        for i in range(4)
    )
    got = reconstruction_loss([s.requires_grad_() for s in scores], attentions)
    torch.testing.assert_close(got, 0.01 * want / 2)
    got.backward()
    assert attentions[0].grad is None and scores[1].grad is not None

    def output():
        logits, tokens = torch.randn(4, 5, generator=g), torch.randn(4, 6, 3, generator=g)
        return Output(logits.requires_grad_(), tokens.requires_grad_(), [], [])

    student, teacher, labels = output(), output(), torch.tensor([0, 3, 2, 2])
    p, t = student.logits.softmax(-1), teacher.logits.softmax(-1)
    kl = (t * (t / p).log()).sum(-1).mean()
    mse = (student.tokens - teacher.tokens).square().mean()
    nll = -p[torch.arange(4), labels].log().mean()
    got = distillation_loss(student, teacher, labels)
    torch.testing.assert_close(got, nll + 0.5 * kl + 0.5 * mse)
    got = distillation_loss(
        student, teacher, labels, label_weight=0.0, logit_weight=2.0, token_weight=3.0
    )
    torch.testing.assert_close(got, 2 * kl + 3 * mse)
    got.backward()
    assert teacher.logits.grad is None and student.tokens.grad is not None


def trained(model, parameters, loss, steps, rate):
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses = []
    for step in range(steps):
        found = loss(images(8, seed=step))
        model.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return losses


def test_both_phases_learn_what_they_are_to():
    model = small(keep=0.4)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(5.0)
    start = copy.deepcopy(model.state_dict())

    def reconstruction(x):
        found = model.reconstruct(x)
        return reconstruction_loss(found.scores, found.attentions)

    losses = trained(model, [*model.predictors()], reconstruction, 50, 2e-2)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    after = model.state_dict()
    for name in start:
        assert torch.equal(after[name], start[name]) == ("mask_predictor" not in name)
    teacher = copy.deepcopy(model)

    def distillation(x):
        with torch.no_grad():
            want = teacher.reconstruct(x)
        return distillation_loss(model(x), want, want.logits.argmax(-1))

    losses = trained(model, [*model.backbone()], distillation, 20, 2e-3)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(
        torch.equal(a, b) for a, b in zip(model.predictors(), teacher.predictors(), strict=True)
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="patch 5 does not divide image 16"):
        Sparsifiner(16, 5)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 16, 16\)"):
        small()(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match="scores of 1 layers and attentions of 0"):
        reconstruction_loss([torch.zeros(1, 1, 1, 2)], [])


def test_growth_is_that_of_the_stated_form():
    (row,) = benchmark.growth((6, 10, 14))
    assert set(row) == COLUMNS
    for part in row["note"].split("over the stated form: ")[1].split(";")[0].split(", "):
        low, high = part.split(" ")[-3::2]
        assert 0.9 < float(low) <= float(high) < 1.2


def test_a_predictor_keeps_more_than_one_mask_where_attention_follows_objects():
    found = benchmark.fit(*benchmark.frozen(), steps=40)
    assert found["predictor at the start"] < found["best mask for all images"]
    assert found["best mask for all images"] + 0.1 < found["predictor"]
    assert found["predictor"] < found["best keys of each image"]
