"""The layer of dynamic mask attention: against transformers' one, and its own decoding."""

from __future__ import annotations

import pytest
import torch
from tests.sparse.test_dma import dense, rand
from transformers import DogeConfig, DynamicCache
from transformers.models.doge.modeling_doge import DogeAttention

from regard import Causal, Full, Keys, attend
from regard.sparse.dma import DynamicMaskAttention, DynamicMaskCache, dynamic_mask


def _layer(window=6, heads=4, kv_heads=2, seed=0, **options):
    torch.manual_seed(seed)
    layer = DynamicMaskAttention(32, heads, kv_heads, window, bias=True, **options).double()
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.4)
    return layer.eval()


def _doge(layer):
    config = DogeConfig(
        hidden_size=32,
        num_attention_heads=layer.heads,
        num_key_value_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        keep_window_size=layer.window,
        attention_bias=True,
    )
    config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
    theirs = DogeAttention(config, layer_idx=0).double().eval()
    theirs.load_state_dict(layer.state_dict())
    return theirs


def _turns(n, width, first=0):
    angles = torch.arange(first, first + n).double()[:, None] * 100.0 ** -(
        torch.arange(0, width, 2).double() / width
    )
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("window", [1, 6, 40])
def test_parity_with_transformers(heads, kv_heads, window):
    layer = _layer(window, heads, kv_heads, head_dim=8)
    x, (cos, sin) = rand(2, 21, 32), _turns(21, 8)
    hidden = torch.ones(21, 21, dtype=torch.bool).triu(1)
    float_mask = torch.zeros(21, 21).double().masked_fill(hidden, torch.finfo(torch.float64).min)
    want, _ = _doge(layer)(x, (cos, sin), float_mask[None, None].expand(2, 1, -1, -1))
    torch.testing.assert_close(layer(x, cos, sin), want)


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 3])
def test_decoding_is_the_whole_pass_and_transformers_decoding(padded):
    layer, x = _layer(5), rand(2, 18, 32)
    valid = torch.arange(18) >= torch.tensor([[0], [padded]])
    mask = Causal() & Keys(valid) if padded else None
    whole = layer(x, *_turns(18, 8), mask)
    cache, theirs, their_cache = DynamicMaskCache(), _doge(layer), DynamicCache()
    for start, stop in [
        (0, 4),
        (4, 5),
        (5, 6),
        (6, 7),
        (7, 10),
        *((i, i + 1) for i in range(10, 18)),
    ]:
        turns = _turns(stop - start, 8, start)
        now = Causal() & Keys(valid[:, :stop]) if padded else None
        out = layer(x[:, start:stop], *turns, now, cache)
        torch.testing.assert_close(out, whole[:, start:stop])
        shown = Causal().dense(stop - start, stop) & valid[:, None, None, :stop]
        minus = torch.zeros(shown.shape).double()
        minus = minus.masked_fill(~shown, torch.finfo(torch.float64).min)
        want, _ = theirs(x[:, start:stop], turns, minus, their_cache)
        real = valid[:, start:stop]
        torch.testing.assert_close(out[real], want[real])
    assert cache.length == 18


@torch.no_grad()
def test_a_decoding_step_reads_w_keys_and_updates_them_one_by_one():
    layer, x, cache = _layer(5), rand(2, 40, 32), DynamicMaskCache()
    layer(x[:, :20], cache=cache)
    for t in range(20, 40):
        _, k, v = layer.project(x[:, t : t + 1])
        _, _, delta = cache.append(k, v, layer.delta(v))
        layout = cache.step(5, group=2)
        assert layout.listed_pairs() == 2 * 4 * 5
        want = dynamic_mask(delta, 5, group=2).dense(1, t + 1)
        assert torch.equal(layout.dense(), want)


@torch.no_grad()
@pytest.mark.parametrize("window", [4, 70])
def test_causal_to_the_bit_in_the_scores_too(window):
    layer, x = _layer(window).float(), rand(2, 150, 32, dtype=torch.float32)
    before = layer(x)
    for at in (1, 17, 70, 149):
        later = x.clone()
        later[:, at:] += 3.0
        assert torch.equal(before[:, :at], layer(later)[:, :at])


@torch.no_grad()
def test_cross_attention_in_the_layer():
    layer, x, context = _layer(6), rand(2, 9, 32), rand(2, 25, 32, seed=5)
    out = layer(x, context=context)
    q, k, v = layer.project(x, context=context)
    want = dense(q, k, v, layer.delta(v), 6, Full().dense(9, 25))
    torch.testing.assert_close(out, layer.o_proj(want.transpose(1, 2).flatten(2)))
    other = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x, context=context[:, other]), out)


def test_empty_batch():
    layer = _layer(3)
    assert layer(rand(0, 9, 32)).shape == (0, 9, 32)


def test_with_scores_of_one_it_is_plain_attention():
    layer = _layer(window=64)
    layer.A.data.zero_()
    x = rand(2, 33, 32)
    q, k, v = layer.project(x)
    want = layer.o_proj(attend(q, k, v, mask=Causal()).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want)


def test_gradients_reach_the_scores_parameters():
    layer = _layer().train()
    layer(rand(2, 20, 32)).square().sum().backward()
    for name in ("A", "dt_proj.weight", "dt_proj.bias"):
        assert float(layer.get_parameter(name).grad.abs().max()) > 1e-6, name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DynamicMaskAttention(32, 4, window=0), "window must be an integer >= 1, got 0"),
        (lambda: DynamicMaskAttention(32, 4, 3), "heads must be a multiple of kv_heads"),
        (lambda: DynamicMaskAttention(30, 4), "dim must be a multiple of heads"),
        (lambda: DynamicMaskAttention(32, 4, score="cube"), "score must be one of exp, linear"),
        (lambda: _layer()(rand(1, 3, 32), _turns(3, 8)[0]), "cos and sin go together"),
        (
            lambda: _layer()(rand(1, 3, 32), cache=DynamicMaskCache(), context=rand(1, 3, 32)),
            "context goes with neither",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
