"""SeerAttention's gate, choice, target and loss against their equations and limiting cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmarks import seer as benchmark
from tests.conformance.examples.seer import gate, logits
from tests.core.dense import dense_attention
from torch.utils._python_dispatch import TorchDispatchMode

from regard import Causal, Keys, SlidingWindow, attend
from regard.core.select import block_allowed, recall
from regard.sparse import seer_distil
from regard.sparse.seer import SeerGate, load_gates, pool_blocks, save_gates
from regard.sparse.seer_choice import gate_choice, gate_select
from regard.sparse.seer_distil import Lesson, distil, seer_loss, seer_target

COLUMNS = {"name", "ours", "theirs", "ratio", "bound", "note"}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (11, 11), (16, 16), (5, 23), (1, 17)])
@pytest.mark.parametrize("width", [8, 6])
def test_gate_is_its_equations(n, m, width):
    made = gate(width=width, rope_base=1e5)
    assert (made.query_weight is None) == (width == 6)
    q, k = rand(2, 4, n, width), rand(2, 2, m, width, seed=1)
    torch.testing.assert_close(made(q, k), logits(made, q, k))


def test_pooling_is_that_of_torch():
    x = rand(2, 3, 22, 5)
    flat = x.flatten(0, 1).mT
    got = pool_blocks(x, 4, extremes=True).split(5, -1)
    high = F.max_pool1d(flat, 4, ceil_mode=True)
    low = -F.max_pool1d(-flat, 4, ceil_mode=True)
    mean = F.avg_pool1d(flat, 4, ceil_mode=True)
    for ours, theirs in zip(got, (high, low, mean), strict=True):
        torch.testing.assert_close(ours.flatten(0, 1).mT, theirs)


def test_identity_weights_compare_pooled_queries_and_keys():
    made = SeerGate(4, 2, 8, block=4, gate_dim=8).double()
    with torch.no_grad():
        made.key_weight.zero_()
        made.key_weight[:, 16:] = torch.eye(8)
    q, k = rand(1, 4, 12, 8), rand(1, 2, 12, 8, seed=1)
    still = torch.zeros(1, 3)
    z = made(q, k, (still, still))
    mean = (
        q.unflatten(2, (3, 4)).mean(3) @ k.unflatten(2, (3, 4)).mean(3).repeat_interleave(2, 1).mT
    )
    mean = mean / 8**0.5
    torch.testing.assert_close(z.tril(), mean.tril())
    assert (z.triu(1).masked_select(torch.ones(3, 3).triu(1) > 0) == -1e9).all()


def test_rows_over_a_cache_are_those_of_the_whole():
    made = gate()
    q, k = rand(1, 4, 24, 8), rand(1, 2, 24, 8, seed=1)
    torch.testing.assert_close(made(q[:, :, 16:], k), made(q, k)[:, :, 4:])


def test_choices():
    z = torch.tensor([[0.0, -1e9, -1e9, -1e9], [3, 1, -1e9, -1e9], [0, 2, 1, -1e9], [1, 4, 3, 2]])
    z = z[None, None]
    causal = torch.ones(4, 4).tril().bool()

    def chosen(**rule):
        return gate_choice(z, causal, **rule)[0, 0].int().tolist()

    none = {"dense_rows": 0, "own": 0}
    first = [1, 0, 0, 0]
    assert chosen(keep=1, **none) == [first, first, [0, 1, 0, 0], [0, 1, 0, 0]]
    # The own block counts; with it two are left in the last row but one.
    assert chosen(keep=2, dense_rows=0) == [first, [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert chosen(keep=1, own=0)[2:] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    # 1 - sqrt(1 - 0.75) = 0.5 of 4 blocks.
    assert chosen(nz_ratio=0.75, **none) == chosen(keep=2, **none)
    assert chosen(nz_ratio=0.01, **none) == chosen(keep=1, **none)
    p = z[0, 0].softmax(-1)
    assert chosen(threshold=0.2, **none) == ((p > 0.2) & causal).int().tolist()
    assert chosen(threshold=0.2, dense_rows=0)[3] == [0, 1, 1, 1]
    assert chosen(threshold=-1.0, **none) == causal.int().tolist()
    # Where the threshold leaves nothing, the own block stays.
    assert chosen(threshold=2.0, dense_rows=0) == torch.eye(4).int().tolist()
    for rule, words in (
        ({}, "got none"),
        ({"keep": 1, "threshold": 0.1}, "keep"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"nz_ratio": 1.5}, "nz_ratio must lie in"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen(**rule)


def test_a_negative_threshold_is_dense():
    q, k, v = rand(2, 4, 22, 8), rand(2, 2, 22, 8, seed=1), rand(2, 2, 22, 5, seed=2)
    layout = gate_select(gate()(q, k), 22, block=4, threshold=-1.0)
    want = dense_attention(q, k, v, torch.ones(22, 22).tril().bool())[0]
    torch.testing.assert_close(attend(q, k, v, layout=layout), want)


def test_every_row_sees_its_own_block():
    for n, m in ((22, 22), (7, 26), (1, 9)):
        q, k = rand(1, 4, n, 8), rand(1, 2, m, 8, seed=1)
        dense = gate_select(gate()(q, k), n, m, block=4, keep=1, dense_rows=0).dense()
        i = torch.arange(m - n, m)
        assert dense[:, :, torch.arange(n), i].all()


def test_no_later_block_has_a_say():
    q, k, v = rand(1, 4, 32, 8), rand(1, 2, 32, 8, seed=1), rand(1, 2, 32, 8, seed=2)

    def out():
        layout = gate_select(gate()(q, k), 32, block=4, keep=3, dense_rows=0)
        return attend(q, k, v, layout=layout)

    before = out()
    for x in (q, k, v):
        x[:, :, 20:] += 10.0
    assert torch.equal(before[:, :, :20], out()[:, :, :20])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (24, 24), (22, 22), (6, 21), (0, 4)])
def test_target_is_the_pooled_dense_map(n, m, monkeypatch):
    q, k = rand(2, 4, n, 8), rand(2, 2, m, 8, seed=1)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    causal = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    target = seer_target(q, k, 4)
    if n:
        pooled = F.max_pool2d(weights, 4, ceil_mode=True)
        torch.testing.assert_close(target, pooled / pooled.sum(-1, keepdim=True))
    assert target.shape == (2, 4, -(-n // 4), -(-m // 4))
    monkeypatch.setattr(seer_distil, "_STRIP", 1)
    torch.testing.assert_close(seer_target(q, k, 4), target)


def test_target_under_a_mask():
    q, k = rand(2, 2, 16, 4), rand(2, 2, 16, 4, seed=1)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, :5] = False
    mask = Causal() & SlidingWindow(6) & Keys(valid)
    target = seer_target(q, k, 4, mask=mask)
    assert torch.equal(target > 0, block_allowed(mask, 16, 16, 4).expand(2, 2, 4, 4) & (target > 0))
    assert (target[1, :, 0] == 0).all() and (target[:, :, 3, 0] == 0).all()
    total = target.sum(-1)
    torch.testing.assert_close(total, (total > 0).double())


def test_target_holds_no_quadratic_tensor(monkeypatch):
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    n = 1024
    monkeypatch.setattr(seer_distil, "_STRIP", 64 * n)
    x = torch.randn(1, 1, n, 4)
    with Largest() as largest:
        seer_target(x, x, 32)
    assert largest.seen <= 64 * n


def test_loss_is_the_divergence_of_the_later_rows():
    z, target = rand(2, 3, 9, 9), rand(2, 3, 9, 9, seed=1).softmax(-1)
    log_p = z[:, :, 2:].log_softmax(-1)
    want = F.kl_div(log_p, target[:, :, 2:], reduction="sum") / (2 * 3 * 7 * 9)
    torch.testing.assert_close(seer_loss(z, target), want)
    assert seer_loss(target.log(), target).abs() < 1e-12 < want
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: seer_loss(x, target), z, fast_mode=True)
    with pytest.raises(ValueError, match="target"):
        seer_loss(z, target[:1])


def test_a_gate_learns_where_attention_goes():
    torch.manual_seed(0)
    n, block = 256, 16
    # Topics that last a block; queries look for their topic.
    topics = torch.randn(6, 8) * 2
    lessons = []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        kind = torch.randint(6, (n // block,), generator=g).repeat_interleave(block)
        k = topics[kind][None, None] + torch.randn(1, 2, n, 8, generator=g) * 0.5
        q = topics[kind.view(-1, block).roll(1, 0).flatten()][None, None] + torch.zeros(1, 4, n, 8)
        lessons.append(Lesson(q, k, seer_target(q, k, block)))
    made = SeerGate(4, 2, 8, block=block, gate_dim=16)
    test = lessons[-1]

    def kept(z):
        layout = gate_select(z, n, block=block, keep=3, dense_rows=0)
        return float(recall(test.q, test.k, layout).mean())

    before = kept(made(test.q, test.k))
    seen = []
    losses = distil(made, lessons[:-1], steps=150, lr=1e-2, progress=lambda *x: seen.append(x))
    after = kept(made(test.q, test.k))
    best = kept(test.target)
    assert len(losses) == len(seen) == 150
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])
    assert after > before + 0.15 and after > 0.9 * best
    with pytest.raises(ValueError, match="lessons is empty"):
        distil(made, [])


def test_files(tmp_path):
    gates = {3: gate(rope_base=1e5), 7: SeerGate(4, 2, 8, block=4, gate_dim=8).bfloat16()}
    path = tmp_path / "gates.safetensors"
    save_gates(gates, path)
    back = load_gates(path)
    assert list(back) == [3, 7]
    for layer, made in gates.items():
        assert back[layer].settings() == made.settings()
        for name, weight in made.state_dict().items():
            assert torch.equal(back[layer].state_dict()[name], weight)
            assert back[layer].state_dict()[name].dtype == weight.dtype
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="not written by save_gates"):
        load_gates(path)


def test_work_of_the_gate():
    flops = benchmark.work((1024, 4096), block=16, width=8)
    c = [1024 // 16, 4096 // 16]
    assert flops == [2 * x * x * 8 + 2 * x * 24 * 8 for x in c]
    assert all(set(row) == COLUMNS for row in benchmark.growth((512, 1024)))
