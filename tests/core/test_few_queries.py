"""A few queries over many keys, as in decoding: only what is listed is gathered."""

import pytest
import torch

from regard import BlockLayout, Causal, attend
from regard.core.backends.gathered import GatheredTiles


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv", "lists"), [(4, 2, 2), (4, 2, 4), (3, 1, 1), (2, 2, 2)])
def test_few_queries_over_a_cache_that_no_block_divides(heads, kv, lists, dtype):
    torch.manual_seed(heads)
    b, n, m = 2, 3, 101
    q, k, v = (torch.randn(b, h, x, 8).to(dtype) for h, x in ((heads, n), (kv, m), (kv, m)))
    index = torch.stack([torch.randperm(13)[:3] for _ in range(b * lists)]).view(b, lists, 1, 3)
    index[..., 0] = 12
    layout = BlockLayout.from_index(index, n, m, (n, 8), Causal())
    assert GatheredTiles(q, k, v, layout).by_token
    out, lse = attend(q, k, v, layout=layout, backend="blocks", return_lse=True)
    expected = attend(q, k, v, layout=layout, backend="reference", return_lse=True)
    # The same keys as slices of a larger cache, and with the heads inside, as some models hold them.
    room = [torch.cat([x, torch.full_like(x, torch.nan)], 2)[:, :, :m] for x in (k, v)]
    inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    for keys, values in (room, inside):
        assert torch.equal(attend(q, keys, values, layout=layout, backend="blocks"), out)
    # bfloat16 scores are made in float32 by both.
    close = (
        {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    )
    torch.testing.assert_close(out, expected[0], **close)
    torch.testing.assert_close(lse, expected[1], **close)


def test_gradients_of_gathered_keys():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, x, 4, dtype=torch.float64) for h, x in ((2, 2), (1, 37), (1, 37)))
    index = torch.tensor([0, 4]).view(1, 1, 1, 2).expand(1, 2, 1, 2).clone()
    index[0, 1, 0, 0] = 1
    layout = BlockLayout.from_index(index, 2, 37, (2, 8), Causal())
    wide = [x.requires_grad_() for x in (q, k, v)]
    few = GatheredTiles(q.detach(), k.detach(), v.detach(), layout)
    assert not few.by_token  # two lists of two blocks are more than half of these few keys
    long_k, long_v = (torch.randn(1, 1, 200, 4, dtype=torch.float64) for _ in range(2))
    layout = BlockLayout.from_index(index, 2, 197, (2, 8), Causal())
    k, v = (x[:, :, :197].requires_grad_() for x in (long_k, long_v))
    assert GatheredTiles(q.detach(), k.detach(), v.detach(), layout).by_token

    def run(*x):
        return attend(*x, layout=layout, backend="blocks", return_lse=True)

    assert torch.autograd.gradcheck(run, (wide[0], k, v))
