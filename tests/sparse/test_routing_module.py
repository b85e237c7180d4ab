"""The centroids of routing attention: both updates, the loss, the module, and decoding."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.conformance.examples.routing import centres

from regard.sparse.routing import routing_attention
from regard.sparse.routing_cache import RoutingCache
from regard.sparse.routing_kmeans import commitment_loss, ema_step, lloyd_step, route_norm
from regard.sparse.routing_module import RoutingAttention


def tokens(n=20, batch=2, heads=2, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n, d, dtype=torch.float64, generator=g)


def groups(x, means, real=None):
    """Tokens closest to each centroid, by head and cluster, as lists of rows."""
    found = [[[] for _ in range(means.shape[1])] for _ in range(means.shape[0])]
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(x.shape[2]):
                if real is None or real[b, i]:
                    found[h][int((means[h] @ x[b, h, i]).argmax())].append(x[b, h, i])
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_moving_averages_count_and_sum_what_is_closest(padded):
    x, means = route_norm(tokens()), centres(2, 5, 6)
    real = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.6 if padded else None
    counts = torch.rand(2, 5, dtype=torch.float64)
    sums = torch.randn(2, 5, 6, dtype=torch.float64)
    got = ema_step(x, means, counts, sums, 0.9, real)
    for h, clusters in enumerate(groups(x, means, real)):
        n = [0.9 * float(counts[h, c]) + 0.1 * len(rows) for c, rows in enumerate(clusters)]
        for c, rows in enumerate(clusters):
            m = 0.9 * sums[h, c] + 0.1 * sum(rows, torch.zeros(6, dtype=torch.float64))
            smooth = (n[c] + 1e-5) / (sum(n) + 5e-5) * sum(n)
            want = m / smooth if rows else means[h, c]
            torch.testing.assert_close(got[0][h, c], want)
            assert float(got[1][h, c]) == pytest.approx(n[c])
            torch.testing.assert_close(got[2][h, c], m)


@pytest.mark.parametrize("form", ["official", "pypi"])
def test_a_lloyd_step_puts_the_mean_back_on_the_sphere(form):
    x, means = route_norm(tokens(), form), centres(2, 5, 6, form)
    got = lloyd_step(x, means, form)
    for h, clusters in enumerate(groups(x, means)):
        for c, rows in enumerate(clusters):
            want = route_norm(torch.stack(rows).mean(0), form) if rows else means[h, c]
            torch.testing.assert_close(got[h, c], want)


def test_empty_clusters_keep_their_centroid_for_ever():
    g = torch.Generator().manual_seed(0)
    axes = torch.eye(6, dtype=torch.float64)
    x = axes[:3].repeat(4, 1) + torch.rand(2, 2, 12, 6, dtype=torch.float64, generator=g) / 10
    # Every token is closer to one of the first three centroids than to the last.
    means = torch.cat([axes[:3], -torch.ones(1, 6)]).expand(2, 4, 6).double()
    for form in ("official", "pypi"):
        assert torch.equal(lloyd_step(x, means, form)[:, 3], means[:, 3])
    state = means, torch.zeros(2, 4, dtype=torch.float64), means.clone()
    for _ in range(300):
        state = ema_step(x, *state, 0.9)
    assert torch.equal(state[0][:, 3], means[:, 3])
    torch.testing.assert_close(state[0][:, 0], x[:, :, ::3].mean((0, 2)), rtol=1e-4, atol=0.0)
    # The first is used no more: its count falls far below the epsilon, and nothing shrinks.
    before = state[0][:, 0].clone()
    for _ in range(300):
        state = ema_step(x[:, :, 1::3], *state, 0.9)
    assert float(state[1][:, 0].max()) < 1e-9 and torch.equal(state[0][:, 0], before)
    # It is taken up again without a jump.
    state = ema_step(x, *state, 0.9)
    torch.testing.assert_close(state[0][:, 0], x[:, :, ::3].mean((0, 2)), rtol=1e-4, atol=0.0)


def test_the_loss_is_the_mean_square_to_the_closest_centroid_and_pulls_tokens_only():
    x, means = route_norm(tokens()).requires_grad_(), centres(2, 5, 6).requires_grad_()
    real = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    for mask in (None, real):
        squares = [
            (row - means[h, c]).square().detach()
            for h, clusters in enumerate(groups(x.detach(), means.detach(), mask))
            for c, rows in enumerate(clusters)
            for row in rows
        ]
        loss = commitment_loss(x, means, mask)
        torch.testing.assert_close(loss, torch.cat(squares).mean().detach())
        (grad,) = torch.autograd.grad(loss, x)
        assert bool((grad != 0).any()) and means.grad is None
        if mask is not None:
            assert bool((grad.transpose(1, 2)[~mask] == 0).all())
    nobody = torch.zeros(2, 20, dtype=torch.bool)
    assert commitment_loss(x, means, nobody).item() == 0.0
    assert commitment_loss(x[:0], means).item() == 0.0


@pytest.mark.parametrize("form", ["official", "pypi"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_module_attends_then_moves_its_centroids(form, shared):
    torch.manual_seed(0)
    module = RoutingAttention(2, 6, 4, 7, 0.8, 0.5, share_qk=shared, form=form).double()
    q, k, v = tokens(), tokens(seed=1), tokens(d=5, seed=2)
    means = module.means.clone()
    out, aux = module(q, k, v)
    torch.testing.assert_close(
        out, routing_attention(q, k, v, means, 7, share_qk=shared, form=form)
    )
    near = [route_norm(x, form) for x in ([q] if shared else [q, k])]
    both = torch.cat(near, dim=2)
    parts = [commitment_loss(x, means) for x in near]
    want = commitment_loss(both, means) if form == "pypi" else torch.stack(parts).sum()
    torch.testing.assert_close(aux, 0.5 * want)
    if form == "pypi":
        moved = 0.8 * means + 0.2 * lloyd_step(both, means, "pypi")
    else:
        moved = ema_step(both, means, torch.zeros(2, 4).double(), means, 0.8)[0]
    torch.testing.assert_close(module.means, moved)
    kept = module.means.clone()
    module.eval()(q, k, v)
    assert torch.equal(module.means, kept), "nothing moves in evaluation"


def test_padding_moves_no_centroid():
    real = torch.ones(2, 20, dtype=torch.bool)
    real[:, 15:] = False
    found = []
    for junk in (0.0, 1e3):
        torch.manual_seed(0)
        module = RoutingAttention(2, 6, 4, 7, share_qk=False, init_steps=2).double()
        q, k, v = tokens(), tokens(seed=1), tokens(seed=2)
        for x in (q, k, v):
            x[:, :, 15:] = junk
        torch.manual_seed(1)
        out, aux = module(q, k, v, pad_mask=real)
        found.append((out, aux, module.means.clone()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["official", "pypi"])
def test_the_first_pass_in_training_starts_from_the_tokens(form):
    g = torch.Generator().manual_seed(0)
    place = 5 * torch.randn(1, 2, 4, 6, generator=g, dtype=torch.float64)
    x = place.repeat(3, 1, 6, 1) + 0.05 * torch.randn(3, 2, 24, 6, generator=g, dtype=torch.float64)
    torch.manual_seed(0)
    module = RoutingAttention(2, 6, 4, 6, share_qk=True, form=form, init_steps=10).double()
    untouched = module.means.clone()
    module.eval()(x, None, x)
    assert torch.equal(module.means, untouched) and not bool(module.started)
    module.start([x], generator=torch.Generator().manual_seed(3))
    again = module.means.clone()
    module.start([x], generator=torch.Generator().manual_seed(3))
    assert bool(module.started) and torch.equal(module.means, again)
    # Every centroid lies on the sphere, in the middle of tokens.
    near = route_norm(x, form).transpose(0, 1).flatten(1, 2)
    gap = torch.cdist(again, near).amin(-1)
    assert float(gap.max()) < 0.2 * float(again.norm(dim=-1).mean())
    few = RoutingAttention(2, 6, 9, 1, share_qk=True, init_steps=1).double()
    few(x[:1, :, :2], None, x[:1, :, :2])
    assert few.means.shape == (2, 9, 6)
    nobody = torch.zeros(3, 24, dtype=torch.bool)
    with pytest.raises(ValueError, match="no real token"):
        module.start([x], [nobody])


@pytest.mark.parametrize("form", ["official", "pypi"])
def test_decoding_is_the_last_row_of_the_text_so_far(form):
    q, k, v = tokens(30), tokens(30, seed=1), tokens(30, d=5, seed=2)
    q[:, :, 20:26] = q[:, :, 3:9]  # equal tokens tie
    for shared in (True, False):
        module = RoutingAttention(2, 6, 3, 6, causal=True, share_qk=shared, form=form).double()
        cache = module.new_cache()
        stops = (0, 1, 2, 9, 10, 30)
        got = torch.cat(
            [
                cache.attend(*(x[:, :, a:b] for x in (q, k, v)))
                for a, b in itertools.pairwise(stops)
            ],
            dim=2,
        )
        for t in range(30):
            text = (x[:, :, : t + 1] for x in (q, k, v))
            want = routing_attention(
                *text, module.means, min(6, t + 1), causal=True, share_qk=shared, form=form
            )
            torch.testing.assert_close(got[:, :, t], want[:, :, t])
        whole = module.eval()(q, k, v)[0]
        assert not torch.allclose(got, whole), "a training pass selects with the future in view"
        assert cache.length == 30


def test_a_cache_holds_a_fixed_number_of_keys_and_does_not_follow_training():
    module = RoutingAttention(2, 6, 3, 4, causal=True)
    cache = module.new_cache()
    x = tokens(40).float()
    cache.attend(x[:, :, :1], None, x[:, :, :1])
    held = sum(t.numel() for t in (cache._k, cache._v))
    means = cache.means.clone()
    module(x, None, x)
    out = cache.attend(x[:, :, 1:], None, x[:, :, 1:])
    assert held == sum(t.numel() for t in (cache._k, cache._v)) == 2 * 2 * 2 * 3 * 4 * 6
    assert torch.equal(cache.means, means) and not torch.equal(module.means, means)
    assert out.dtype == torch.float32 and out.shape == (2, 2, 39, 6)
    with pytest.raises(ValueError, match="a token came for"):
        cache.attend(x[:1, :, :1], None, x[:1, :, :1])


def test_grouped_heads_decode_too():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 12, 6, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 12, 6, generator=g, dtype=torch.float64)
    means = centres(4, 3, 6)
    cache = RoutingCache(means, 5, share_qk=False)
    got = cache.attend(q, k, v)
    for t in range(12):
        text = (x[:, :, : t + 1] for x in (q, k, v))
        want = routing_attention(*text, means, min(5, t + 1), causal=True, share_qk=False)
        torch.testing.assert_close(got[:, :, t], want[:, :, t])


def test_training_learns_the_planted_clusters():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(5)
    centre = torch.randn(1, 2, 8, 12, generator=g)
    module = RoutingAttention(2, 12, 8, 16, decay=0.9, share_qk=True)
    losses = []
    for _ in range(30):
        member = torch.randint(8, (4, 1, 64), generator=g)
        x = centre.expand(4, 2, 8, 12).gather(2, member[..., None].expand(4, 2, 64, 12))
        x = x + 0.2 * torch.randn(4, 2, 64, 12, generator=g)
        losses.append(float(module(x, None, x)[1]))
    assert losses[-1] < 0.5 * losses[0]
