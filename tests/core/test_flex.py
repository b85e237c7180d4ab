"""The flex backend: its block masks, its results uncompiled, and (slow) compiled."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from regard import BlockLayout, Causal, DenseBias, Full, PerHead, Sinks, SlidingWindow, attend
from regard.core.backends import flex
from regard.core.call import Call

from .dense import dense_attention

STREAMING = Causal() & (SlidingWindow(50) | Sinks(2))


def _qkv(n, m, h=4, hkv=2):
    g = torch.Generator().manual_seed(n)
    return [torch.randn(2, x, y, 16, generator=g) for x, y in ((h, n), (hkv, m), (hkv, m))]


@pytest.mark.parametrize("mask", [Full(), Causal(), STREAMING, PerHead([Causal(), STREAMING])])
def test_block_masks_hold_the_layout(mask):
    layout = mask.layout(300, 400, 128)
    dense = layout.dense()
    tiles = (
        torch.nn.functional.pad(dense, (0, 112, 0, 84))
        .unflatten(3, (4, 128))
        .unflatten(2, (3, 128))
    )
    assert torch.equal(flex.block_mask(layout).to_dense().bool(), tiles.any(5).any(3))
    assert flex.block_mask(layout) is flex.block_mask(layout)


@pytest.mark.parametrize("mask", [Full(), STREAMING, PerHead([Causal(), SlidingWindow(9)] * 2)])
@pytest.mark.parametrize(("n", "m"), [(300, 300), (130, 300)])
def test_uncompiled_it_agrees(mask, n, m, monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    q, k, v = _qkv(n, m)
    allowed = mask.dense(n, m)
    out = attend(q, k, v, mask=mask, backend="flex")
    torch.testing.assert_close(out, dense_attention(q, k, v, allowed)[0], rtol=1e-4, atol=1e-5)
    bias = DenseBias(torch.randn(4, n, m))
    out = attend(q, k, v, mask=mask, bias=bias, backend="flex")
    want = dense_attention(q, k, v, allowed, bias.tensor)[0]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_it_returns_the_lse_where_it_can(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    q, k, v = _qkv(150, 150)
    # Uncompiled, FlexAttention looks at the mask alone; which blocks are listed shows when compiled.
    layout = Causal().layout(150, 150, 128)
    out, lse = flex.run(q, k, v, Call(layout.mask, layout, None, 0.25, need_lse=True))
    want, want_lse = dense_attention(q, k, v, layout.dense(), scale=0.25)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


def test_why_not():
    q, k, v = _qkv(8, 8)
    assert "needs a layout" in flex.why_not(q, k, v, Call(None, None, None, 1.0))


@pytest.mark.slow
def test_compiled_it_reads_the_listed_blocks_alone():
    q, k, v = _qkv(300, 300)
    index = torch.tensor([[[[0, -1], [0, 1], [1, 2]]]])
    layout = BlockLayout.from_index(index, 300, 300, 128, Causal())
    want = dense_attention(q, k, v, layout.dense())[0]
    out = attend(q, k, v, layout=layout, backend="flex")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [STREAMING, PerHead([Causal(), SlidingWindow(9)] * 2)])
def test_compiled_it_agrees(mask):
    q, k, v = _qkv(300, 300)
    want = dense_attention(q, k, v, mask.dense(300))[0]
    out = attend(q, k, v, mask=mask, backend="flex")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
