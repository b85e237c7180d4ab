"""Tiles of windows on grids, against loops over coordinates and dense attention written out here."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from regard import Causal, attend
from regard.core import windows as module
from regard.core.attend import plan
from regard.core.backends import hidden, strips
from regard.core.bias_base import Bias
from regard.core.grid import GridMask

from .dense import dense_attention


@dataclass(frozen=True)
class Table(GridMask):
    """Windows by hand: for every axis and residue class the keys `[lo, hi)` of each place."""

    grid: tuple[int, ...]
    ends: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    text: int = 0

    @property
    def text_after(self):
        return self.text

    @property
    def steps(self):
        return tuple(len(classes) for classes in self.ends)

    def windows(self, axis, residue):
        return tuple(torch.tensor(self.ends[axis][residue]).unbind(1))

    def near(self, q, k):
        found = torch.ones((), dtype=torch.bool)
        for x, y, extent, classes in zip(q, k, self.grid, self.ends, strict=True):
            step = len(classes)
            seen = torch.tensor([classes[i % step][i // step] for i in range(extent)])[x]
            place = torch.div(y, step, rounding_mode="floor")
            found = (
                found & (x % step == y % step) & (place >= seen[..., 0]) & (place < seen[..., 1])
            )
        return found

    def box(self, q, k):
        some = torch.ones_like(q.lo[0] + k.lo[0], dtype=torch.bool)
        return some, torch.zeros_like(some)


LINE = tuple((max(0, i - 2), min(7, i + 3)) for i in range(7))
WIDENS = tuple((i // 3, 1 + i) for i in range(9))
HALVES = (((0, 2), (0, 3), (2, 4), (2, 4)), ((0, 1), (0, 2), (0, 3)))
ALL = ((0, 5),) * 5
MASKS = {
    "line x line": Table((7, 7), ((LINE,), (LINE,))),
    "uneven": Table((7, 9), ((LINE,), (WIDENS,))),
    "dilated last": Table((9, 7), ((WIDENS,), HALVES)),
    "dilated first": Table((7, 5), (HALVES, (ALL,))),
    "everything": Table((5, 5), ((ALL,), (ALL,))),
    "three axes": Table((5, 7, 7), ((ALL,), HALVES, (LINE,))),
    "one point": Table((1, 1), ((((0, 1),),), (((0, 1),),))),
}
by_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def by_hand(mask):
    """The dense mask, point by point."""
    points = list(itertools.product(*(range(extent) for extent in mask.grid)))

    def sees(x, y, classes):
        step = len(classes)
        lo, hi = classes[x % step][x // step]
        return x % step == y % step and lo <= y // step < hi

    return torch.tensor(
        [[all(map(sees, q, k, mask.ends)) for k in points] for q in points], dtype=torch.bool
    )


def qkv(n, heads=4, kv_heads=2, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    shapes = ((heads, 4), (kv_heads, 4), (kv_heads, 6))
    return [torch.randn(batch, h, n, d, generator=g, dtype=dtype) for h, d in shapes]


def tiles(found):
    """Indices of the queries and keys of every tile, and who sees whom in it."""
    index = torch.arange(math.prod(found.grid)).view(found.grid)
    for box in itertools.product(*found.axes):
        allowed = torch.ones(1, 1, dtype=torch.bool)
        for stretch in box:
            allowed = torch.kron(allowed.byte(), stretch.allowed().byte()).bool()
        queries, keys = (tuple(getattr(s, x) for s in box) for x in ("queries", "keys"))
        yield index[queries].flatten(), index[keys].flatten(), allowed


@by_mask
@pytest.mark.parametrize("heads", [1, 64])
def test_tiles_hold_all_pairs_and_no_key_in_vain(mask, heads):
    n, want = mask.points, by_hand(mask)
    found = module.windows(mask, n, n, heads, 1)
    got, queries, pairs = torch.zeros(n, n, dtype=torch.bool), [], 0
    for rows, keys, allowed in tiles(found):
        assert allowed.any(0).all() and allowed.any(1).all()
        got[rows[:, None], keys] = allowed
        queries += rows.tolist()
        pairs += allowed.numel()
    assert sorted(queries) == list(range(n))
    assert torch.equal(got, want)
    assert found.density == pytest.approx(pairs / n**2)


@by_mask
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_and_gradients_are_dense_attention(mask, kv_heads):
    n = mask.points
    inputs = [x.requires_grad_() for x in qkv(n, kv_heads=kv_heads)]
    assert plan(*inputs, mask=mask).call.windows is not None
    got = attend(*inputs, mask=mask, scale=0.7, return_lse=True)
    want = dense_attention(*inputs, by_hand(mask), scale=0.7)
    g = [torch.randn_like(x) for x in want]
    both = [torch.autograd.grad([*pair], inputs, g) for pair in (got, want)]
    for a, b in zip((*got, *both[0]), (*want, *both[1]), strict=True):
        torch.testing.assert_close(a, b)


@by_mask
def test_few_heads_at_a_time_and_no_memory_for_masks(mask, monkeypatch):
    q, k, v = qkv(mask.points, batch=3)
    want = dense_attention(q, k, v, by_hand(mask))[0]
    monkeypatch.setattr(hidden, "_KEEP", 1)
    for name in ("_STRIP", "_PAIRS"):
        monkeypatch.setattr(strips, name, 1)
    module._cut.cache_clear()
    torch.testing.assert_close(attend(q, k, v, mask=mask), want)
    assert not plan(q, k, v, mask=mask).call.windows.memo


@pytest.mark.parametrize("rows", [1, 3, 1 << 20])
@pytest.mark.parametrize("name", ["dilated last", "three axes"])
def test_tiles_of_any_size(name, rows, monkeypatch):
    mask = MASKS[name]
    module._sides.cache_clear()
    monkeypatch.setattr(module, "_ROWS", rows)
    q, k, v = qkv(mask.points, heads=2)
    found = plan(q, k, v, mask=mask).call.windows
    most = math.prod(max(s.last - s.first for s in axis) for axis in found.axes)
    assert most <= rows
    torch.testing.assert_close(
        attend(q, k, v, mask=mask), dense_attention(q, k, v, by_hand(mask))[0]
    )
    module._sides.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_other_dtypes(dtype, tolerance):
    mask = MASKS["uneven"]
    inputs = qkv(mask.points, dtype=torch.float32)
    got, lse = attend(*(x.to(dtype) for x in inputs), mask=mask, return_lse=True)
    want = dense_attention(*(x.to(dtype).double() for x in inputs), by_hand(mask))
    assert (got.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(got.double(), want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)


@by_mask
def test_a_bias_with_heads_batch_and_gradient(mask):
    n = mask.points
    q, k, v = qkv(n)
    bias = torch.randn(2, 4, n, n, dtype=torch.float64, requires_grad=True)
    got = attend(q, k, v, mask=mask, bias=bias)
    want = dense_attention(q, k, v, by_hand(mask), bias=bias)[0]
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    own, theirs = (torch.autograd.grad(x, bias, g)[0] for x in (got, want))
    torch.testing.assert_close(own, theirs)


@dataclass(frozen=True, eq=False)
class Seen(Bias):
    """No bias, but notes who asked for which pairs."""

    pairs: list

    def scores(self, i, j, h=0, b=0):
        self.pairs.append(torch.broadcast_tensors(i, j, torch.as_tensor(h), torch.as_tensor(b)))
        return torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.float64)


def test_a_bias_is_asked_once_for_every_pair_of_a_tile():
    mask, seen = MASKS["dilated last"], Seen([])
    q, k, v = qkv(mask.points)
    attend(q, k, v, mask=mask, bias=seen)
    count = torch.zeros(2, 4, mask.points, mask.points)
    for i, j, h, b in seen.pairs:
        count.index_put_((b, h, i, j), torch.ones(()), accumulate=True)
    assert count.max() == 1 and bool((count[:, :, by_hand(mask)] == 1).all())


def test_dropout_is_the_same_forward_and_backward():
    mask = MASKS["dilated first"]
    n = mask.points
    q, k, _ = qkv(n, kv_heads=4, batch=1)
    one = torch.eye(n, dtype=torch.float64).expand(1, 4, n, n).clone().requires_grad_()
    weights = attend(q, k, one, mask=mask)

    def dropped():
        g = torch.Generator().manual_seed(5)
        return attend(q, k, one, mask=mask, dropout=0.4, generator=g)

    got = dropped()
    kept = got != 0
    assert torch.equal(got, dropped())
    torch.testing.assert_close(got[kept], weights[kept] / 0.6)
    assert 0.5 < kept[weights != 0].double().mean() < 0.7
    # The gradient of a sum over queries weighted by g is W^T g, with the same weights.
    g = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, one, g)[0], got.detach().mT @ g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_key_without_number_reaches_no_row_that_may_not_see_it(poison, dtype):
    mask = MASKS["line x line"]
    q, k, v = qkv(mask.points, dtype=dtype)
    before, lse_before = attend(q, k, v, mask=mask, return_lse=True)
    k[:, :, 24] = poison
    after, lse = attend(q, k, v, mask=mask, return_lse=True)
    hidden = ~by_hand(mask)[:, 24]
    assert 0 < hidden.sum() < mask.points
    torch.testing.assert_close(after[:, :, hidden], before[:, :, hidden])
    torch.testing.assert_close(lse[:, :, hidden], lse_before[:, :, hidden])
    assert after[:, :, ~hidden].isnan().any()


def test_where_windows_do_not_serve_there_is_a_layout():
    mask = MASKS["uneven"]
    n = mask.points
    q, k, v = qkv(n)
    with_text = Table(mask.grid, mask.ends, text=2)
    more = qkv(n + 2)
    for inputs, other in (
        ((q, k, v), mask & Causal()),
        ((q[:, :, 9:], k, v), mask),
        (more, with_text),
        (qkv(7), Table((7,), ((LINE,),))),
    ):
        chosen = plan(*inputs, mask=other)
        assert chosen.call.windows is None and chosen.call.layout is not None
        m = inputs[1].shape[2]
        want = dense_attention(*inputs, other.dense(inputs[0].shape[2], m))[0]
        torch.testing.assert_close(attend(*inputs, mask=other), want)
    own = mask.layout(n, n, 8)
    assert plan(q, k, v, layout=own).call.windows is None


def test_nothing_to_compute():
    mask = MASKS["uneven"]
    for backend in ("auto", "blocks"):
        q, k, v = (x[:0].requires_grad_() for x in qkv(mask.points))
        out, lse = attend(q, k, v, mask=mask, return_lse=True, backend=backend)
        assert out.shape == (0, 4, mask.points, 6) and lse.shape == (0, 4, mask.points)
        assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape
