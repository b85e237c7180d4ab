"""One query over chosen blocks against the definition: layouts, masks, caches, dtypes, gradients."""

from __future__ import annotations

import pytest
import torch

from regard import BlockLayout, Causal, Dense, Keys, attend
from regard.core.backends import one_row
from regard.core.call import Call

B, H, KV, M, D = 2, 6, 3, 53, 8


def drawn(dtype=torch.float64, m=M, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, 1, D), (B, KV, m, D), (B, KV, m, 5))
    return tuple(
        torch.randn(*x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes
    )


def layout(batch, heads, mask=None, keep=3, seed=1):
    """Random lists of blocks of 8, some shorter than others, one empty where there are several."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-M // 8)
    index = torch.rand(batch, heads, 1, blocks, generator=generator).argsort(-1)[..., :keep]
    short = torch.rand(index.shape, generator=generator) < 0.3
    index = index.masked_fill(short, -1)
    if batch * heads > 1:
        index[0, -1] = -1
    return BlockLayout.from_index(index, 1, M, (1, 8), mask)


def masks():
    generator = torch.Generator().manual_seed(2)
    valid = torch.rand(B, M, generator=generator) < 0.7
    own = torch.rand(B, H, 1, M, generator=generator) < 0.7
    return {
        "none": None,
        "causal": Causal(),
        "padding": Causal() & Keys(valid),
        "per head": Dense(own),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("heads", [1, KV, H])
def test_is_the_definition(name, batch, heads):
    q, k, v = drawn()
    mask = masks()[name]
    if name == "per head" and heads != H:
        heads = H
    chosen = layout(batch, heads, mask)
    assert one_row.serves(q, Call(mask=chosen.mask, layout=chosen, bias=None, scale=1.0))
    out, lse = attend(q, k, v, layout=chosen, return_lse=True, backend="blocks")
    expected, sums = attend(q, k, v, layout=chosen, return_lse=True, backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, sums)
    if batch * heads > 1:  # the last list of the first entry is empty
        assert not out[0, -1].any() and bool((lse[0, -1] == -torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = drawn(dtype)
    chosen = layout(B, KV)
    out = attend(q, k, v, layout=chosen)
    assert out.dtype == dtype
    exact = attend(*(x.double() for x in (q, k, v)), layout=chosen, backend="reference")
    torch.testing.assert_close(
        out.double(), exact, atol=1e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
    )


def test_slices_and_odd_strides_are_read_as_they_lie():
    q, k, v = drawn()
    chosen = layout(B, KV)
    expected = attend(q, k, v, layout=chosen)
    for place in ("slice", "tokens first", "expanded", "every second"):
        moved = []
        for x in (k, v):
            if place == "slice":
                room = x.new_full((B, KV, 2 * M, x.shape[3]), torch.nan)
                room[:, :, 7 : 7 + M] = x
                moved.append(room[:, :, 7 : 7 + M])
            elif place == "tokens first":
                moved.append(x.transpose(1, 2).contiguous().transpose(1, 2))
            elif place == "expanded":
                moved.append(x[:1].expand(B, -1, -1, -1))
            else:
                moved.append(x.repeat_interleave(2, 3)[..., ::2])
        if place == "expanded":
            expected_here = attend(q, *(x.contiguous() for x in moved), layout=chosen)
        else:
            expected_here = expected
        assert torch.equal(attend(q, *moved, layout=chosen), expected_here), place


def test_gradients():
    q, k, v = (x.requires_grad_() for x in drawn(m=M))
    chosen = layout(1, KV)
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, layout=chosen, return_lse=False), (q[:1], k[:1], v[:1])
    )
    full = layout(1, 1, keep=7)
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, layout=full, return_lse=True), (q[:1], k[:1], v[:1])
    )


def test_other_calls_are_left_to_tiles():
    q, _, _ = drawn()
    chosen = layout(B, KV)
    plain = Call(mask=None, layout=chosen, bias=None, scale=1.0)
    assert not one_row.serves(torch.cat([q, q], 2), plain)
    assert not one_row.serves(q, Call(mask=None, layout=None, bias=None, scale=1.0))
    assert not one_row.serves(q, Call(mask=None, layout=chosen, bias=None, scale=1.0, dropout=0.1))


@pytest.mark.parametrize("backend", ["auto", "blocks", "reference"])
def test_a_batch_of_nothing(backend):
    empty = [x[:0] for x in drawn()]
    out, lse = attend(*empty, layout=layout(1, KV), backend=backend, return_lse=True)
    assert out.shape == (0, H, 1, 5) and lse.shape == (0, H, 1)
