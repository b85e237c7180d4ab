"""TransNormerLLM's layers against their equations, the limits, streaming, and padding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from benchmarks import tnl as benchmark

from regard.linear.lightning2 import decay_slopes
from regard.linear.tnl import (
    SGLU,
    SimpleRMSNorm,
    TNLAttention,
    TNLBlock,
    TNLLowRankGate,
    simple_rms_norm,
)
from regard.linear.tnl_lrpe import LRPE, lrpe
from regard.linear.tnl_model import TransNormerLLM


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind, *args, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return kind(*args).to(dtype).eval()


def written_out(module, x, layer, layers):
    """Gated linear attention from the module's weights, pair by pair, positions as a phase."""
    heads, dim = module.heads, x.shape[-1]
    q, k, v, u = (x @ module.qkvu_proj.weight.T).chunk(4, -1)
    q, k = q * q.sigmoid(), k * k.sigmoid()
    slopes = decay_slopes(heads, layer, layers)
    out = torch.zeros_like(v)
    width = dim // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        theta = torch.zeros(width, dtype=x.dtype)
        if module.lrpe is not None:
            theta = module.lrpe.theta[h, 0]
        for t in range(x.shape[1]):
            for s in range(t + 1):
                phase = torch.exp(1j * theta * (t - s)).real
                score = (q[:, t, part] * k[:, s, part] * phase).sum(-1)
                score = score * math.exp(-float(slopes[h]) * (t - s))
                out[:, t, part] += score[:, None] * v[:, s, part]
    out = out / (out.norm(dim=-1, keepdim=True).square() / dim + 1e-6).sqrt()
    return (u * out) @ module.out_proj.weight.T


@pytest.mark.parametrize(
    ("dim", "heads", "layer", "layers", "n"),
    [(12, 3, 0, 3, 17), (12, 4, 1, 3, 9), (8, 1, 2, 3, 21), (8, 2, 0, 2, 1)],
)
def test_attention_is_the_equations_written_out(dim, heads, layer, layers, n):
    module = make(TNLAttention, dim, heads, layer, layers)
    assert (module.lrpe is not None) == (layer == 0)
    x = rand(2, n, dim)
    torch.testing.assert_close(module(x), written_out(module, x, layer, layers))
    chosen = make(TNLAttention, dim, heads, layer, layers, layer != 0)
    torch.testing.assert_close(chosen(x), written_out(chosen, x, layer, layers))


def test_block_without_decay_and_positions_is_plain_linear_attention():
    block = make(TNLBlock, 12, 3, 20, 0, 2)
    block.token_mixer.slopes = (0.0,) * 3
    torch.nn.init.zeros_(block.token_mixer.lrpe.theta)
    x = rand(2, 11, 12)
    norm = F.rms_norm(x, (12,), eps=1e-6)
    q, k, v, u = block.token_mixer.qkvu_proj(norm).chunk(4, -1)
    q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (F.silu(q), F.silu(k), v))
    mixed = ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)
    y = x + block.token_mixer.out_proj(u * F.rms_norm(mixed, (12,), eps=1e-6))
    unit = block.channel_mixer
    norm = F.rms_norm(y, (12,), eps=1e-6)
    want = y + unit.l3(unit.l1(norm) * unit.l2(norm))
    torch.testing.assert_close(block(x), want)


def test_simple_rms_norm_has_no_weight_and_the_epsilon_inside():
    x = rand(3, 7)
    torch.testing.assert_close(simple_rms_norm(x), F.rms_norm(x, (7,), eps=1e-6))
    torch.testing.assert_close(SimpleRMSNorm(1e-2)(x), F.rms_norm(x, (7,), eps=1e-2))
    assert not simple_rms_norm(torch.zeros(2, 3)).any()
    assert not list(SimpleRMSNorm().parameters())
    # In float32, as released: squares of large halves would overflow.
    large = torch.full((2, 4), 1e4, dtype=torch.float16)
    assert torch.equal(simple_rms_norm(large), torch.ones(2, 4, dtype=torch.float16))
    assert torch.autograd.gradcheck(simple_rms_norm, rand(2, 3).requires_grad_())


def test_lrpe_depends_on_distances_only():
    positions = LRPE(2, 3).double()
    torch.testing.assert_close(
        positions.theta.flatten(), 10000.0 ** (-2 * torch.arange(6).double() / 6), rtol=1e-6, atol=0
    )
    q, k = rand(1, 2, 5, 3), rand(1, 2, 5, 3, seed=1)
    scores = []
    for offset in (0, 1000):
        angles = positions(torch.arange(offset, offset + 5)[None])
        scores.append(lrpe(q, angles) @ lrpe(k, angles).mT)
    torch.testing.assert_close(*scores)
    norm = lrpe(q, positions(torch.arange(5)[None])).square().sum(-1)
    torch.testing.assert_close(norm, q.square().sum(-1))


LAYERS = {
    "lrpe": (TNLAttention, (8, 2, 0, 3)),
    "last": (TNLAttention, (8, 2, 2, 3)),
    "block": (TNLBlock, (8, 2, 12, 0, 3)),
    "low-rank": (TNLLowRankGate, (8, 2, 1, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_call_is_many_calls(name):
    kind, args = LAYERS[name]
    module, x = make(kind, *args), rand(2, 150, 8)
    whole, last = module(x, return_state=True)
    assert torch.equal(whole, module(x))
    assert last.position.tolist() == [150, 150]
    for sizes in ([1] * 150, [70, 80], [3, 1, 64, 82]):
        state, parts = None, []
        for part in x.split(sizes, 1):
            out, state = module(part, state, return_state=True)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state.memory, last.memory)
        assert torch.equal(state.position, last.position)


@torch.no_grad()
def test_a_thousand_tokens_one_by_one_in_float32():
    module, x = make(TNLBlock, 16, 2, 16, 0, 2, dtype=torch.float32), rand(1, 1000, 16).float()
    whole = module(x)
    state, parts = None, []
    for token in x.split(1, 1):
        out, state = module(token, state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_skipped(name):
    kind, args = LAYERS[name]
    module, x = make(kind, *args), rand(3, 20, 8)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :6] = False
    mask[1, 5:9] = False
    mask[2, 13:] = False
    out, state = module(x, mask=mask, return_state=True)
    assert state.position.tolist() == [14, 16, 13]
    for b in range(3):
        alone, end = module(x[b : b + 1, mask[b]], return_state=True)
        torch.testing.assert_close(out[b : b + 1, mask[b]], alone)
        torch.testing.assert_close(state.memory[b : b + 1], end.memory)
    # Streams of different lengths go on together.
    more = rand(3, 4, 8, seed=2)
    after = module(more, state)
    for b in range(3):
        alone = module(torch.cat([x[b : b + 1, mask[b]], more[b : b + 1]], 1))
        torch.testing.assert_close(after[b : b + 1], alone[:, -4:])


def test_padding_in_front_is_the_released_codes():
    """The released code zeroes values and lets positions and decay go on."""
    module, x = make(TNLAttention, 8, 2, 0, 3), rand(1, 12, 8)
    mask = torch.arange(12)[None] >= 5
    with torch.no_grad():
        out = module(x, mask=mask)
        zeroed = x.clone()
        zeroed[:, :5] = 0  # no bias: keys and values of a zero token are zero
        torch.testing.assert_close(out[:, 5:], module(zeroed)[:, 5:])


def test_names_are_the_checkpoints():
    model = TransNormerLLM(11, 8, 2, 2, 12)
    layer = ["token_mixer.qkvu_proj.weight", "token_mixer.out_proj.weight"]
    layer += [f"channel_mixer.l{i}.weight" for i in (1, 2, 3)]
    names = {f"model.layers.{i}.{name}" for i in (0, 1) for name in layer}
    names |= {"model.layers.0.token_mixer.lrpe.theta", "model.embed_tokens.weight"}
    state = model.state_dict()
    assert set(state) == names | {"lm_head.weight"}
    assert state["model.layers.0.token_mixer.lrpe.theta"].shape == (2, 1, 4)
    assert model.model.layers[0].token_mixer.qkvu_proj.weight.shape == (32, 8)
    assert SGLU(8, 12).l3.weight.shape == (8, 12)


def test_rounding_the_weights_leaves_the_decay():
    module = make(TNLAttention, 8, 2, 0, 3).to(torch.bfloat16)
    assert module.slopes == tuple(decay_slopes(2, 0, 3).tolist())


def test_generation_streams():
    model = make(TransNormerLLM, 13, 16, 3, 2)
    ids = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(0))
    new, state = model.generate(ids, 12, return_state=True)
    grown = ids
    with torch.no_grad():
        for _ in range(12):
            grown = torch.cat([grown, model(grown)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(new, grown[:, 9:])
        assert torch.equal(model.generate(new[:, -1:], 5, state=state), model.generate(grown, 5))
        whole = model(grown)
        logits, state = model(grown[:, :7], return_state=True)
        torch.testing.assert_close(torch.cat([logits, model(grown[:, 7:], state)], 1), whole)
    drawn = [
        model.generate(ids, 8, temperature=2.0, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    ]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], new[:, :8])


def test_model_skips_padding_and_is_causal():
    model = make(TransNormerLLM, 13, 16, 2, 2)
    ids = torch.randint(13, (1, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None] >= 4
    torch.testing.assert_close(model(ids, mask=mask)[:, 4:], model(ids[:, 4:]))
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 13
    assert torch.equal(model(ids)[:, :8], model(changed)[:, :8])
    assert not torch.equal(model(ids)[:, 8:], model(changed)[:, 8:])


def test_no_tokens_and_no_batch():
    module = make(TNLAttention, 8, 2, 0, 3)
    _, state = module(rand(2, 5, 8), return_state=True)
    out, same = module(rand(2, 0, 8), state, return_state=True)
    assert out.shape == (2, 0, 8)
    torch.testing.assert_close(same.memory, state.memory)
    assert torch.equal(same.position, state.position)
    assert module(rand(0, 5, 8)).shape == (0, 5, 8)


def test_work_a_token_does_not_grow():
    step, prompt = benchmark.growth(contexts=(16, 64, 256), sizes=(128, 256, 512))
    assert "N^0.000" in step["note"] and "N^1.0" in prompt["note"]


def test_decoding_is_the_prompt_pass():
    rows = benchmark.decoding(contexts=(8, 64), repeats=2)
    assert float(rows[-1]["note"].split("at most ")[1].split()[0]) < 1e-4


def test_training_repeats():
    losses = [benchmark.learn(steps=3, length=32, batch=2, report=0)[0] for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_language_model_learns():
    before, after, pairs = benchmark.learn(steps=150)
    assert before == pytest.approx(7.0, abs=0.3)
    assert after < pairs < before
