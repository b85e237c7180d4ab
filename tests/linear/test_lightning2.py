"""Lightning Attention-2 against its masked quadratic form, limits, and transformers' MiniMax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from benchmarks import lightning2 as benchmark
from tests.golden.test_golden import DATA

from regard.core.recur_packed import recur_packed
from regard.linear.lightning2 import decay_slopes, lightning_attention


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(b=2, h=4, kv=4, n=50, d=6, e=5, dtype=torch.float64):
    return (
        rand(b, h, n, d, dtype=dtype),
        rand(b, kv, n, d, seed=1).to(dtype),
        rand(b, kv, n, e, seed=2).to(dtype),
    )


def written_out(q, k, v, slopes=None, keep=None):
    """`sum_{s <= t} exp(-m (t - s)) (q_t · k_s) v_s`, pair by pair; `keep` skips tokens."""
    b, h, n, _ = q.shape
    group = h // k.shape[1]
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    for x in range(b):
        for y in range(h):
            m = 0.0 if slopes is None else float(slopes.flatten()[y])
            for t in range(n):
                distance = 0
                for s in range(t, -1, -1):
                    if keep is None or keep[x, s]:
                        pair = q[x, y, t] @ k[x, y // group, s]
                        out[x, y, t] += math.exp(-m * distance) * pair * v[x, y // group, s]
                    distance += 1 if keep is None else int(keep[x, s])
    return out


@pytest.mark.parametrize(("h", "kv", "n"), [(4, 4, 37), (1, 1, 1), (6, 2, 19), (3, 3, 33)])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_is_the_masked_quadratic_form(h, kv, n, chunk):
    q, k, v = inputs(1, h, kv, n)
    slopes = decay_slopes(h)
    want = written_out(q, k, v, slopes)
    for given in (slopes, slopes[:, None, None]):
        out = lightning_attention(q, k, v, given, chunk=chunk)
        torch.testing.assert_close(out, want)
    steps = lightning_attention(q, k, v, slopes, backend="reference")
    torch.testing.assert_close(steps, want)
    torch.testing.assert_close(lightning_attention(q, k, v, chunk=chunk), written_out(q, k, v))


def test_slopes_are_those_of_the_authors():
    with np.load(DATA / "lightning2.npz") as file:
        golden = torch.from_numpy(file["slopes"]).flatten()
    assert torch.equal(decay_slopes(4).float(), golden)
    # Written out in specs/linear-theory.md for H = 6.
    assert decay_slopes(6).tolist() == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    for heads in (1, 2, 4, 8, 16, 32):
        want = [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
        assert decay_slopes(heads).tolist() == pytest.approx(want)
    for heads in (3, 12, 40):
        below = 2 ** int(math.log2(heads))
        want = [*decay_slopes(below), *decay_slopes(2 * below)[::2][: heads - below]]
        assert torch.equal(decay_slopes(heads), torch.stack(want))
    layers = [decay_slopes(4, layer, 3) / decay_slopes(4) for layer in range(3)]
    torch.testing.assert_close(
        torch.stack(layers)[:, 0], torch.tensor([1.00001, 0.50001, 1e-5], dtype=torch.float64)
    )


def test_slopes_are_transformers_alibi():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 2, 3, 6, 8, 12, 40):
        alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).reshape(heads, 2)[:, 1]
        torch.testing.assert_close(decay_slopes(heads).float(), alibi)


def test_is_transformers_minimax():
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=3,
        num_hidden_layers=3,
        block_size=8,
        layer_types=["linear_attention"] * 3,
    )
    theirs = MiniMaxLightningAttention(config, layer_idx=1)
    x = torch.randn(2, 21, 12)
    q, k, v = (
        theirs.act_fn(theirs.qkv_proj(x)).reshape(2, 21, 4, 9).transpose(1, 2).split(3, dim=-1)
    )
    out, state = lightning_attention(q, k, v, theirs.slope_rate, return_state=True)
    out = theirs.norm(out.transpose(1, 2).flatten(2))
    out = theirs.out_proj(torch.sigmoid(theirs.output_gate(x)) * out)
    want, kept = theirs(x, (x, x), None)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state, kept)


def test_limits():
    q, k, v = inputs()
    sums = (k[..., None] * v[..., None, :]).cumsum(2)
    want = (q[..., None, :] @ sums).squeeze(-2)
    torch.testing.assert_close(lightning_attention(q, k, v), want)
    torch.testing.assert_close(lightning_attention(q, k, v, torch.zeros(4)), want)
    own = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(lightning_attention(q, k, v, torch.full((4,), 1e4)), own)
    both = lightning_attention(q, k, v, decay_slopes(4), causal=False)
    forward = lightning_attention(q, k, v, decay_slopes(4))
    flipped = (x.flip(2) for x in (q, k, v))
    backward = lightning_attention(*flipped, decay_slopes(4)).flip(2)
    torch.testing.assert_close(both, forward + backward - own)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_thousand_calls_are_one(masked, dtype, bound):
    q, k, v = inputs(1, 2, 2, 1000, 4, 4, dtype)
    slopes = decay_slopes(2, 1, 3)
    mask = torch.rand(1, 1000, generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None
    whole, last = lightning_attention(q, k, v, slopes, mask=mask, return_state=True)
    state, parts = None, []
    for t in range(1000):
        at = slice(t, t + 1)
        part, state = lightning_attention(
            *(x[:, :, at] for x in (q, k, v)),
            slopes,
            mask=None if mask is None else mask[:, at],
            state=state,
            return_state=True,
        )
        parts.append(part)
    assert (torch.cat(parts, 2) - whole).abs().max() < bound * whole.abs().max()
    assert (state - last).abs().max() < bound * last.abs().max()


def test_padding_neither_writes_nor_decays():
    q, k, v = inputs(2, 3, 3, 20)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) > 0.4
    slopes = decay_slopes(3)
    out, state = lightning_attention(q, k, v, slopes, mask=mask, return_state=True)
    torch.testing.assert_close(out, written_out(q, k, v, slopes, mask))
    for b in range(2):
        alone = [x[b : b + 1][:, :, mask[b]] for x in (q, k, v)]
        short, end = lightning_attention(*alone, slopes, return_state=True)
        torch.testing.assert_close(out[b : b + 1][:, :, mask[b]], short)
        torch.testing.assert_close(state[b : b + 1], end)
    k[:, :, ~mask[0]] = torch.nan
    left = lightning_attention(q[:1], k[:1], v[:1], slopes, mask=mask[:1])
    torch.testing.assert_close(left, out[:1])


def test_packed_sequences_are_separate_ones():
    q, k, v = inputs(1, 3, 3, 30)
    cu = torch.tensor([0, 11, 11, 30])
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = recur_packed(*flat, cu, decay=-decay_slopes(3))
    for a, z in ((0, 11), (11, 30)):
        want = lightning_attention(*(x[:, :, a:z] for x in (q, k, v)), decay_slopes(3))
        torch.testing.assert_close(out[a:z].transpose(0, 1), want[0])


def test_gradients():
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 9, 3, 2))
    slopes = decay_slopes(2).requires_grad_()
    state = rand(1, 2, 3, 2, seed=5).requires_grad_()
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4:6] = False

    def run(q, k, v, slopes, state, mask=None):
        return lightning_attention(
            q, k, v, slopes, mask=mask, state=state, chunk=4, return_state=True
        )

    assert torch.autograd.gradcheck(run, (q, k, v, slopes, state))
    assert torch.autograd.gradcheck(lambda *x: run(*x, mask), (q, k, v, slopes, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slow_heads_do_not_underflow_in_half_precision(dtype):
    q, k, v = inputs(1, 2, 2, 3000, 4, 4, dtype)
    slopes = torch.tensor([1e-5, 1e-3])
    out, state = lightning_attention(q / 50, k, v, slopes, chunk=1024, return_state=True)
    assert out.dtype == dtype and state.dtype == torch.float32
    exact = lightning_attention((q / 50).double(), k.double(), v.double(), slopes)
    assert ((out.double() - exact).abs().max() / exact.abs().max()) < torch.finfo(dtype).eps


def test_small_widths_and_no_tokens():
    # The released wrapper refuses widths that divide 16.
    for d in (1, 2, 4, 8, 16):
        q, k, v = inputs(1, 2, 2, 5, d, 3)
        out = lightning_attention(q, k, v, decay_slopes(2))
        torch.testing.assert_close(out, written_out(q, k, v, decay_slopes(2)))
    q, k, v = inputs(2, 2, 2, 0)
    out, state = lightning_attention(q, k, v, decay_slopes(2), return_state=True)
    assert out.shape == (2, 2, 0, 5) and not state.any()
    assert lightning_attention(q[:0], k[:0], v[:0], decay_slopes(2)).shape == (0, 2, 0, 5)


def test_cost_is_linear_where_the_quadratic_form_is_not():
    tiled, quadratic = benchmark.growth((256, 512, 1024))
    slopes = [float(r["note"].split("N^")[1].split(";")[0]) for r in (tiled, quadratic)]
    assert slopes == pytest.approx([1.0, 2.0], abs=0.02)
    work = [benchmark.flops(n, 64) for n in (512, 1024, 2048)]
    assert work[1] == 2 * work[0] and work[2] == 4 * work[0]
    # O(N c D + N D^2): twice the scores' width costs less than twice, D^2 stays.
    wide, wider = benchmark.flops(1024, 64), benchmark.flops(1024, 128)
    assert wide < wider < 2 * wide


def test_the_benchmarks_rows():
    rows = benchmark.per_token(sizes=(64, 128), quadratic=(64, 128), repeats=1)
    assert {"name", "ours", "theirs", "ratio", "bound", "note"} == set(rows[0])
    assert all(r["ours"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slopes": -torch.ones(4)}, "slopes must be >= 0, got down to -1"),
        ({"slopes": torch.ones(3)}, r"for H heads of \(4, 2\), got \(3,\)"),
        ({"slopes": torch.ones(4, 4)}, r"got \(4, 4\)"),
        ({"slopes": torch.tensor(1.0)}, r"got \(\)"),
        ({"mask": torch.ones(2, 8)}, r"mask must be bool \(2, 8\), got torch.float32"),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, r"got torch.bool \(2, 7\)"),
        ({"v": torch.zeros(2, 4, 8, 5)}, "recur: v must be"),
        ({"state": torch.zeros(2, 4, 5, 5)}, "recur: state must be"),
    ],
)
def test_bad_input_is_named(change, words):
    q, k, v = inputs(2, 4, 2, 8)
    given = {"q": q, "k": k, "v": v, "slopes": decay_slopes(4), **change}
    with pytest.raises(ValueError, match=words):
        lightning_attention(**given)
