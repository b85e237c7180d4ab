"""Rows that name their key block, against dense attention under the mask that this makes."""

from __future__ import annotations

import pytest
import torch

from regard.core.row_blocks import attend_row_blocks


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_that_name_their_block():
    q, k, v = rand(2, 4, 90, 8), rand(2, 2, 37, 8, seed=1), rand(2, 2, 37, 3, seed=2)
    for choice in (
        torch.randint(-1, 5, (2, 4, 90), generator=torch.Generator().manual_seed(0)),
        torch.full((2, 4, 90), 4),
        torch.full((2, 4, 90), -1),
    ):
        kk, vv = (x.repeat_interleave(2, 1) for x in (k, v))
        seen = torch.arange(37) // 8 == choice[..., None]
        logits = (q @ kk.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
        out, lse = attend_row_blocks(q, k, v, choice, 8)
        torch.testing.assert_close(out, logits.softmax(-1).nan_to_num(0.0) @ vv)
        torch.testing.assert_close(lse, logits.logsumexp(-1))
    inputs = [x[:1, :2, :6].clone().requires_grad_() for x in (q, k, v)]
    choice = torch.tensor([[[0, 1, -1, 2, 1, 1], [2, 0, 0, 0, 1, 2]]])

    def finite(*x):
        out, lse = attend_row_blocks(*x, choice, 2)
        return out, lse[choice >= 0]

    assert torch.autograd.gradcheck(finite, inputs, fast_mode=True)
    # A later row that changes its mind moves no earlier one by a bit.
    choice = torch.randint(5, (2, 4, 90), generator=torch.Generator().manual_seed(1))
    q, k, v = q.float(), k.float(), v.float()
    before, _ = attend_row_blocks(q, k, v, choice, 8)
    choice[..., 50:] = 1
    assert torch.equal(attend_row_blocks(q, k, v, choice, 8)[0][:, :, :50], before[:, :, :50])
    empty, lse = attend_row_blocks(q[:, :, :0], k, v, choice[..., :0], 8)
    assert empty.shape == (2, 4, 0, 3) and lse.shape == (2, 4, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: attend_row_blocks(*rand(3, 1, 1, 6, 4), torch.zeros(1, 1, 5).long(), 2),
            r"choice is \(1, 1, 5\)",
        ),
        (
            lambda: attend_row_blocks(*rand(3, 1, 1, 6, 4), torch.full((1, 1, 6), 3), 2),
            r"must lie in \[-1, 3\), got 3",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
