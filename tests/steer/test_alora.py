"""ALoRA against its formula written out, torch's attention and plain LoRA."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks import alora as benchmark
from tests.models.tiny import left_padding
from torch import nn

from regard.steer.alora import ALoRA, ALoRACache, ALoRALinear


def layer(residual=True, r=6, heads=2, seed=0):
    torch.manual_seed(seed)
    made = ALoRALinear(nn.Linear(5, 7), r, heads, 9.0, residual).double()
    nn.init.normal_(made.B.weight)
    return made


def inputs(n=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 5, generator=g, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
def test_is_the_formula_written_out(residual):
    made, x = layer(residual), inputs()
    got = made(x)
    for b in range(2):
        u = [made.A.weight @ t for t in x[b]]
        for t in range(8):
            parts = []
            for h in (slice(0, 3), slice(3, 6)):
                q = (made.q.weight @ u[t])[h]
                keys = [(made.k.weight @ s)[h] for s in u[: t + 1]]
                values = [(made.v.weight @ s)[h] for s in u[: t + 1]]
                scores = [math.exp(float(q @ k) / math.sqrt(3)) for k in keys]
                parts.append(sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores))
            inner = made.o.weight @ torch.cat(parts) + (u[t] if residual else 0)
            want = made.base(x[b, t]) + 9.0 / 6 * made.B.weight @ inner
            torch.testing.assert_close(got[b, t], want)


@torch.no_grad()
def test_is_torchs_attention_in_the_low_rank():
    made, x = layer(), inputs()
    theirs = nn.MultiheadAttention(6, 2, bias=False, batch_first=True).double()
    theirs.in_proj_weight.copy_(torch.cat([made.q.weight, made.k.weight, made.v.weight]))
    theirs.out_proj.weight.copy_(made.o.weight)
    u = x @ made.A.weight.T
    future = torch.ones(8, 8).triu(1).bool()
    for padded in (None, left_padding(2, 8, 3)):
        hide = None if padded is None else ~padded.bool()
        read = theirs(u, u, u, attn_mask=future, key_padding_mask=hide, need_weights=False)[0]
        want = made.base(x) + 1.5 * (u + read) @ made.B.weight.T
        got = made(x, attention_mask=padded)
        real = slice(None) if padded is None else slice(3, None)
        torch.testing.assert_close(got[:, real], want[:, real])
        assert torch.isfinite(got).all()


@torch.no_grad()
def test_limits():
    made, x = layer(), inputs()
    fresh = ALoRALinear(made.base, 6, 2)
    assert torch.equal(fresh.double()(x), made.base(x))  # B = 0 at first
    made.v.weight.zero_()  # what remains is LoRA
    torch.testing.assert_close(made(x), made.base(x) + 1.5 * x @ (made.B.weight @ made.A.weight).T)
    alone = layer(residual=False)
    alone.v.weight.zero_()
    torch.testing.assert_close(alone(x), alone.base(x))


@torch.no_grad()
def test_causal_and_cached():
    made, x = layer(), inputs()
    whole = made(x)
    later = x.clone()
    later[:, 5:] += 9
    assert torch.equal(made(later)[:, :5], whole[:, :5])
    assert not torch.allclose(made(later)[:, 5:] - made.base(later)[:, 5:], whole[:, 5:])
    mask = left_padding(2, 8, 2)
    for padded in (None, mask):
        cache, parts, at = ALoRACache(), [], 0
        for stop in (3, 4, 7, 8):
            hide = None if padded is None else padded[:, :stop]
            parts.append(made(x[:, at:stop], cache, hide))
            at = stop
        assert cache.length == 8
        torch.testing.assert_close(torch.cat(parts, 1), made(x, attention_mask=padded))
    cache.crop(4)
    torch.testing.assert_close(made(x[:, 4:], cache, mask), made(x, attention_mask=mask)[:, 4:])


def test_copying_needs_attention():
    """A map of each token alone cannot beat chance; the adapter that attends solves it."""
    rows = {r["name"]: r["note"] for r in benchmark.copying(steps=120)}
    accuracy = {name: float(note.split()[1].rstrip("%,")) for name, note in rows.items()}
    assert accuracy["ALoRA"] > 95
    assert accuracy["LoRA"] < 25 and accuracy["base"] < 25  # chance is 12.5 %


def test_cost_is_quadratic():
    note = benchmark.growth((128, 256, 512))[0]["note"]
    assert 1.9 < float(note.split("N^")[1].split(":")[0]) < 2.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ALoRALinear(nn.Linear(3, 3), 5, 2), "heads 2 must divide the rank r=5"),
        (lambda: layer()(inputs(), attention_mask=torch.ones(2, 7)), r"must be \(2, 8\)"),
        (lambda: ALoRA(3, 3, 5, 2), "ALoRA: heads 2 must divide the rank r=5"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
