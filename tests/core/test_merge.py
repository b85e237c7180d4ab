"""merge against one dense float64 softmax over all keys, written with plain torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard.core.merge import merge


def dense(q, k, v, keep=None):
    s = q @ k.transpose(-1, -2)
    if keep is not None:
        s = s.masked_fill(~keep, -math.inf)
    lse = torch.logsumexp(s, -1)
    return torch.softmax(s, -1).nan_to_num(0.0) @ v, lse


def inputs(seed=0, m=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, 5, 4, generator=g, dtype=dtype)
    k = torch.randn(2, 3, m, 4, generator=g, dtype=dtype)
    v = torch.randn(2, 3, m, 6, generator=g, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize("cuts", [(0, 11), (0, 4, 11), (0, 1, 2, 7, 11), (0, 3, 3, 11)])
def test_any_partition_gives_the_whole(cuts):
    q, k, v = inputs()
    parts = []
    for a, b in itertools.pairwise(cuts):
        if a == b:
            parts.append((torch.zeros(2, 3, 5, 6).double(), torch.full((2, 3, 5), -math.inf)))
        else:
            parts.append(dense(q, k[:, :, a:b], v[:, :, a:b]))
    out, lse = merge(parts)
    want, want_lse = dense(q, k, v)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_associative():
    q, k, v = inputs(1)
    a, b, c = (dense(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 3), slice(3, 4), slice(4, 11)))
    left, right, flat = merge([merge([a, b]), c]), merge([a, merge([b, c])]), merge([a, b, c])
    for other in (right, flat):
        torch.testing.assert_close(left[0], other[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(left[1], other[1], rtol=1e-13, atol=1e-13)


def test_log_weight_counts_keys_several_times():
    q, k, v = inputs(2)
    one, two = dense(q, k[:, :, :5], v[:, :, :5]), dense(q, k[:, :, 5:], v[:, :, 5:])
    out, lse = merge([one, two], log_weights=[None, math.log(3.0)])
    again = torch.cat([k, k[:, :, 5:], k[:, :, 5:]], 2), torch.cat([v, v[:, :, 5:], v[:, :, 5:]], 2)
    want, want_lse = dense(q, *again)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    # A tensor per row; -inf leaves the part out.
    out, _ = merge([one, two], log_weights=[0.0, torch.full((5,), -math.inf)])
    torch.testing.assert_close(out, one[0])


def test_empty_rows_and_garbage_in_empty_parts():
    q, k, v = inputs(3)
    keep = torch.ones(5, 11, dtype=torch.bool)
    keep[2] = False
    out, lse = dense(q, k, v, keep)
    junk = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    got, got_lse = merge([(out, lse), junk])
    assert torch.equal(got[:, :, 2], torch.zeros_like(got[:, :, 2]))
    assert torch.isneginf(got_lse[:, :, 2]).all()
    torch.testing.assert_close(got, out)


def test_gradients_with_an_empty_part():
    q, k, v = inputs(4)
    a, b = dense(q, k[:, :, :5], v[:, :, :5]), dense(q, k[:, :, 5:], v[:, :, 5:])
    leaves = [t.detach()[:1, :1].clone().requires_grad_() for t in (*a, *b)]
    gone = torch.full((1, 1, 5), -math.inf, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)

    def joined(o1, l1, o2, l2, o3, l3):
        return merge([(o1, l1), (o2, l2), (o3, l3)])

    assert torch.autograd.gradcheck(joined, (*leaves, none, gone))
    # Every part empty: the gradient is zero, not NaN.
    out, lse = merge([(none, gone), (none, gone)])
    (out.sum() + lse.nan_to_num(neginf=0.0).sum()).backward()
    assert torch.equal(gone.grad, torch.zeros_like(gone))
    assert torch.equal(none.grad, torch.zeros_like(none))


def test_half_precision_is_joined_in_float32():
    q, k, v = inputs(5, dtype=torch.float32)
    a, b = dense(q, k[:, :, :5], v[:, :, :5]), dense(q, k[:, :, 5:], v[:, :, 5:])
    out, lse = merge([(a[0].bfloat16(), a[1]), (b[0].bfloat16(), b[1])])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse, dense(q, k, v)[1])


def test_large_scores_do_not_overflow():
    one = torch.ones(1, 1)
    out, lse = merge([(one, torch.tensor([1000.0])), (-one, torch.tensor([-1000.0]))])
    assert out.item() == 1.0 and lse.item() == 1000.0


def test_bad_input_names_itself():
    one = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="merge: parts is empty"):
        merge([])
    with pytest.raises(ValueError, match=r"merge: part 1 has out \(2, 4\)"):
        merge([one, (torch.zeros(2, 4), torch.zeros(2))])
    with pytest.raises(ValueError, match="merge: 1 log_weights came for 2 parts"):
        merge([one, one], log_weights=[0.0])
    with pytest.raises(ValueError, match=r"log_weights\[0\] has shape \(3,\)"):
        merge([one], log_weights=[torch.zeros(3)])
