"""LSceneLLM where positions have three axes: the scene is an image's tokens (Qwen2-VL)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.golden.pine import rotate
from tests.steer import moving
from tests.steer.tiny_vlm import qwen2_5_vl, qwen2_vl

import regard
from regard.models import SiteProbe, Spans, capture
from regard.steer.lscenellm import LSceneLLM

SPANS = Spans.of(24, scene=(3, 19), text=(20, 24))
BUILDS = pytest.mark.parametrize("build", [qwen2_vl, qwen2_5_vl])


def biased(build):
    """The model with biases that are not zero, and its inputs."""
    model, inputs, _ = build()
    generator = torch.Generator().manual_seed(4)
    for layer in model.get_decoder().layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            bias = getattr(layer.self_attn, name).bias
            with torch.no_grad():
                bias.copy_(torch.randn(bias.shape, generator=generator))
    return model, inputs


def features(n=2):
    return torch.randn(16, n, 32, generator=torch.Generator().manual_seed(9))


def rope(x, places):
    """M-RoPE with sections 1, 1, 2: every pair of channels is turned by the axis of its section."""
    turned = [rotate(x, places[axis], base=1e4) for axis in (0, 1, 2, 2)]
    return torch.stack([turned[c % 4][..., c] for c in range(8)], -1)


@torch.no_grad()
@BUILDS
def test_is_one_softmax_written_out(build):
    """A layer's output from its input: dense keys stand at row and column of their scene token."""
    model, inputs = biased(build)
    dense = features()
    with (
        regard.patch(model, LSceneLLM(dense, first=1), spans=SPANS),
        regard.watch(model, SiteProbe("weights", layers=[1])) as seen,
    ):
        sites = capture(model, inputs, "heads", "resid")
    # Text in front, an image of 4 x 4 tokens, and text behind its last row and column.
    cell = torch.arange(16)
    image = torch.stack([0 * cell, cell // 4, cell % 4]) + 3
    text = [torch.arange(a, z).expand(3, -1) for a, z in ((0, 3), (7, 12))]
    places = torch.cat([text[0], image, text[1]], 1)
    layer = model.get_decoder().layers[2]
    hidden = layer.input_layernorm(sites["resid", 1])
    q, k, v, dense_k, dense_v = (
        getattr(layer.self_attn, name)(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for name, x in (
            ("q_proj", hidden),
            ("k_proj", hidden),
            ("v_proj", hidden),
            ("k_proj", dense.flatten(0, 1)[None]),
            ("v_proj", dense.flatten(0, 1)[None]),
        )
    )
    q, k = rope(q, places), rope(k, places)
    dense_k = rope(dense_k, image.repeat_interleave(2, 1))
    keys, values = (
        torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((k, dense_k), (v, dense_v))
    )
    looked = seen.result()[0][1].sum(1)[0, :, 3:19]
    opened = 0
    for t in range(24):
        open_ = torch.zeros(16, dtype=torch.bool)
        if t >= 20:
            scaled = (looked[t] - looked[t].min()) / (looked[t].max() - looked[t].min())
            open_ = scaled * 255 > 96
        opened += int(open_.sum())
        sees = torch.cat([torch.arange(24) <= t, open_.repeat_interleave(2)])
        scores = (keys[0] @ q[0, :, t, :, None])[..., 0] / 8**0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        want = (weights[:, None] @ values[0])[:, 0]
        torch.testing.assert_close(sites["heads", 2][0, t], want, atol=1e-4, rtol=1e-4)
    assert 4 <= opened < 48


@torch.no_grad()
@BUILDS
def test_on_images(build):
    model, inputs = biased(build)
    plain = model(**inputs).logits
    steer = LSceneLLM(features(), first=0)
    for nothing in (replace(steer, threshold=1.0), replace(steer, alpha=0.0)):
        with regard.patch(model, nothing, spans=SPANS):
            torch.testing.assert_close(model(**inputs).logits, plain, atol=1e-6, rtol=1e-6)
    with regard.patch(model, steer, spans=SPANS):
        steered = model(**inputs).logits
        tokens = model.generate(**inputs, **moving.GREEDY)
    assert (steered - plain)[:, 20:].abs().max() > 1e-3
    torch.testing.assert_close(steered[:, :20], plain[:, :20], atol=1e-5, rtol=1e-5)
    # The end of the text is not to come yet.
    assert tokens[0, 24] == steered[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_decoding_is_one_pass():
    model, inputs = biased(qwen2_vl)
    method = LSceneLLM(features(), first=0)
    moving.steps_behind_an_image_are_one_pass(model, inputs, SPANS, method)
