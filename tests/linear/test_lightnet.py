"""LightNet's attention against its definition, its limits, streaming, padding and precision."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks import lightnet as benchmark

from regard.linear.lightnet import LightNetState, additive_gate, lightnet_attention


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(b=2, h=4, kv=2, n=37, width=5, value=3):
    return rand(b, h, n, width), rand(b, kv, n, width, seed=1) * 2, rand(b, kv, n, value, seed=2)


def softmax_so_far(q, k, v, mass, scale, keep=None):
    """`S_t = sum_s softmax_{s <= t}(k)_s v_s^T`, with `mass` added to every denominator."""
    b, h, n, _ = q.shape
    group = h // k.shape[1]
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    for x in range(b):
        for y in range(h):
            z = y // group
            for t in range(n):
                seen = [s for s in range(t + 1) if keep is None or keep[x, s]]
                if not seen:
                    continue
                delta = k[x, z, seen].exp()
                weight = delta / (delta.sum(0) + mass)
                out[x, y, t] = scale * (q[x, y, t] @ (weight.T @ v[x, z, seen]))
    return out


@pytest.mark.parametrize(("h", "kv", "n"), [(4, 2, 37), (1, 1, 1), (3, 3, 21)])
@pytest.mark.parametrize(("mass", "scale"), [(0, None), (1, 1.0)])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_is_a_softmax_over_the_tokens_so_far(h, kv, n, mass, scale, chunk):
    q, k, v = inputs(2, h, kv, n)
    want = softmax_so_far(q, k, v, mass, 5**-0.5 if scale is None else scale)
    out = lightnet_attention(q, k, v, initial_mass=mass, scale=scale, chunk=chunk)
    torch.testing.assert_close(out, want)
    steps = lightnet_attention(q, k, v, initial_mass=mass, scale=scale, backend="reference")
    torch.testing.assert_close(steps, want)


@pytest.mark.parametrize("mass", [0, 1])
def test_is_the_additive_recurrence(mass):
    q, k, v = inputs(1, 2, 2, 15)
    state = torch.zeros(1, 2, 5, 3, dtype=torch.float64)
    total, out = torch.full((1, 2, 5), float(mass), dtype=torch.float64), []
    for t in range(15):
        delta = k[:, :, t].exp()
        before, total = total, total + delta
        state = (before / total)[..., None] * state
        state = state + (delta / total)[..., None] * v[:, :, t, None]
        out.append(q[:, :, t, None] @ state)
    found, end = lightnet_attention(q, k, v, initial_mass=mass, scale=1.0, return_state=True)
    torch.testing.assert_close(found, torch.cat(out, 2))
    torch.testing.assert_close(end.memory, state)
    torch.testing.assert_close(end.mass, total.log())


def test_both_ways():
    q, k, v = inputs(2, 4, 2, 33)
    out = lightnet_attention(q, k, v, causal=False, scale=1.0)
    memory = (k.softmax(2).mT @ v).repeat_interleave(2, 1)
    torch.testing.assert_close(out, q @ memory)
    # The last row of the causal form has seen all.
    for mass in (0, 1):
        last = lightnet_attention(q, k, v, scale=1.0, initial_mass=mass)[:, :, -1:]
        every = lightnet_attention(q, k, v, scale=1.0, initial_mass=mass, causal=False)[:, :, -1:]
        torch.testing.assert_close(last, every)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    moved = lightnet_attention(*(x[:, :, order] for x in (q, k, v)), causal=False, scale=1.0)
    torch.testing.assert_close(moved, out[:, :, order])


def test_the_claims_figures():
    light, decay = benchmark.scan_order(sides=(4,))
    gaps = [float(r["note"].split("by ")[2].split(",")[0]) for r in (light, decay)]
    assert gaps[0] < 1e-5 and gaps[1] > 1


@pytest.mark.parametrize("mass", [0, 1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_thousand_calls_are_one(mass, dtype, bound):
    q, k, v = (x.to(dtype) for x in inputs(1, 2, 1, 1000))
    whole, last = lightnet_attention(q, k, v, initial_mass=mass, return_state=True)
    for sizes in ([1] * 1000, [300, 1, 699]):
        state, parts = None, []
        for part in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True):
            out, state = lightnet_attention(
                *part, initial_mass=mass, state=state, return_state=True
            )
            parts.append(out)
        assert (torch.cat(parts, 2) - whole).abs().max() < bound * whole.abs().max()
        assert (state.memory - last.memory).abs().max() < bound
        assert (state.mass - last.mass).abs().max() < bound


def test_a_long_stream_keeps_the_weight_of_a_token():
    """After 1e8 tokens of equal weight, 1000 more raise the mass by 1e-5: not lost to rounding."""
    mass = torch.full((1, 1, 1), math.log(1e8), dtype=torch.float64)
    start = LightNetState(torch.ones(1, 1, 1, 1), mass)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    state = start
    for _ in range(1000):
        _, state = lightnet_attention(one, zero, zero, state=state, return_state=True)
    assert float(state.mass - start.mass) == pytest.approx(math.log1p(1e-5), rel=1e-5)
    tokens = (one.expand(1, 1, 1000, 1), *[zero.expand(1, 1, 1000, 1)] * 2)
    _, together = lightnet_attention(*tokens, state=start, return_state=True)
    assert float(together.mass - start.mass) == pytest.approx(math.log1p(1e-5), rel=1e-5)


def test_the_mean_of_many_equal_tokens_in_float32():
    n = 100_000
    v = torch.randn(1, 1, n, 1, generator=torch.Generator().manual_seed(0)) + 1
    one, zero = torch.ones(1, 1, n, 1), torch.zeros(1, 1, n, 1)
    out = lightnet_attention(one, zero, v, scale=1.0).double()
    mean = v.double().cumsum(2) / torch.arange(1, n + 1)[:, None]
    torch.testing.assert_close(out, mean, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_large_logits_stay_in_logs(causal, offset):
    q, k, v = inputs(1, 2, 2, 40)
    want = lightnet_attention(q, k, v, causal=causal)
    out = lightnet_attention(q, k + offset, v, causal=causal)
    torch.testing.assert_close(out, want)
    single = lightnet_attention(
        q.float(), (k * 50 + offset).float(), v.float(), causal=causal
    ).double()
    double = lightnet_attention(q, (k * 50 + offset).float().double(), v, causal=causal)
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3)


def test_half_precision_is_computed_in_float32():
    half = [x.bfloat16() for x in inputs(1, 2, 2, 300)]
    out, state = lightnet_attention(*half, return_state=True)
    assert out.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    exact = lightnet_attention(*(x.float() for x in half))
    torch.testing.assert_close(out, exact.bfloat16())


@pytest.mark.parametrize("mass", [0, 1])
def test_padding_neither_writes_nor_decays(mass):
    q, k, v = inputs(3, 2, 2, 24)
    mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :5] = False
    mask[1] = False
    out, state = lightnet_attention(
        q, k, v, initial_mass=mass, scale=1.0, mask=mask, return_state=True
    )
    torch.testing.assert_close(out, softmax_so_far(q, k, v, mass, 1.0, mask))
    assert not out[0, :, :5].any() and not out[1].any()
    for b in (0, 2):
        alone = [x[b : b + 1][:, :, mask[b]] for x in (q, k, v)]
        short, end = lightnet_attention(*alone, initial_mass=mass, scale=1.0, return_state=True)
        torch.testing.assert_close(out[b : b + 1][:, :, mask[b]], short)
        torch.testing.assert_close(state.memory[b : b + 1], end.memory)
        torch.testing.assert_close(state.mass[b : b + 1], end.mass)
        both = lightnet_attention(*alone, causal=False)
        every = lightnet_attention(q, k, v, causal=False, mask=mask)[b : b + 1]
        torch.testing.assert_close(every[:, :, mask[b]], both)
    assert state.mass[1].eq(0 if mass else -torch.inf).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mass", [0, 1])
def test_gradients(causal, mass):
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 1, 7, 3, 2))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 4:6] = False
    for given in (None, mask):

        def run(q, k, v, given=given):
            return lightnet_attention(
                q, k, v, causal=causal, initial_mass=mass, mask=given, chunk=4
            )

        assert torch.autograd.gradcheck(run, (q, k, v))
    if causal:
        memory, before = rand(2, 1, 3, 2, seed=5), rand(2, 1, 3, seed=6)

        def stream(q, k, v, memory, before):
            state = LightNetState(memory, before)
            out, end = lightnet_attention(q, k, v, state=state, return_state=True)
            return (out, *end)

        leaves = (memory.requires_grad_(), before.requires_grad_())
        assert torch.autograd.gradcheck(stream, (q, k, v, *leaves))


def test_a_token_without_weight_in_one_channel_changes_nothing_there():
    q, k, v = inputs(1, 1, 1, 12)
    k[:, :, 5, 2] = -torch.inf
    keys, decay, mass = additive_gate(k, torch.full((1, 1, 5), -torch.inf, dtype=torch.float64))
    assert keys[0, 0, 5, 2] == 0 and decay[0, 0, 5, 2] == 0
    assert not decay[:, :, 0].any() and (keys[:, :, 0] == 1).all()
    torch.testing.assert_close(mass, k.logsumexp(2))
    torch.testing.assert_close(
        lightnet_attention(q, k, v, scale=1.0), softmax_so_far(q, k, v, 0, 1.0)
    )


def test_later_tokens_move_nothing_earlier():
    q, k, v = (x.float() for x in inputs(1, 2, 2, 70))
    before = lightnet_attention(q, k, v, chunk=16)
    for x in (q, k, v):
        x[:, :, 40:] += 5
    after = lightnet_attention(q, k, v, chunk=16)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


def test_no_tokens():
    q, k, v = inputs(2, 2, 1, 7)
    _, state = lightnet_attention(q, k, v, return_state=True)
    out, same = lightnet_attention(
        q[:, :, :0], k[:, :, :0], v[:, :, :0], state=state, return_state=True
    )
    assert out.shape == (2, 2, 0, 3)
    torch.testing.assert_close(same.memory, state.memory)
    assert torch.equal(same.mass, state.mass)
    for causal in (True, False):
        assert lightnet_attention(q[:0], k[:0], v[:0], causal=causal).shape == (0, 2, 7, 3)


def test_cost_is_linear():
    for r in benchmark.growth((256, 512, 1024)):
        assert float(r["note"].split("N^")[1].split(";")[0]) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 4, 8)}, "must be .batch, heads, length, width"),
        ({"initial_mass": 3}, "initial_mass must be 0 or 1, got 3"),
        ({"k_logits": torch.full((2, 2, 8, 5), -torch.inf)}, "leaves a key channel without mass"),
        ({"k_logits": torch.full((2, 2, 8, 5), torch.inf)}, "NaN or .inf"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, r"mask must be bool \(2, 8\)"),
        ({"causal": False, "return_state": True}, "causal=False has no state"),
        (
            {"state": LightNetState(torch.zeros(2, 2, 5, 3), torch.zeros(2, 2, 4))},
            r"state.mass must be \(2, 2, 5\), got \(2, 2, 4\)",
        ),
        ({"v": torch.zeros(2, 2, 7, 3)}, "recur: v must be"),
    ],
)
def test_bad_input_is_named(change, words):
    q, k, v = inputs(2, 4, 2, 8)
    with pytest.raises(ValueError, match=words):
        lightnet_attention(**{"q": q, "k_logits": k, "v": v, **change})
