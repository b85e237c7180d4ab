"""Routing Transformer (arXiv 2003.05997): what learned clusters are worth, and how the work grows.

    python -m benchmarks.routing [--json] [--only planted|growth|decoding] [--train] [--time]

The paper's claims: clusters that online k-means learns carry more of the attention than random ones;
cost O(N^1.5) at sqrt(N) clusters of sqrt(N) tokens. `--train` trains a small decoder to recall a
marked token that its local heads cannot reach (about two minutes). There random centroids that stay
where they are do no worse than learned ones, since queries learn to meet them (with three seeds a
little better). Seconds are those of working a figure out, of training in the last rows.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from regard import Causal, SlidingWindow, attend
from regard.bench.timing import paired, row
from regard.sparse import routing_cache, routing_clusters
from regard.sparse.routing import routing_attention, routing_lists
from regard.sparse.routing_kmeans import route_norm
from regard.sparse.routing_module import RoutingAttention

from . import main, tiny_recall
from .counted import counted, slope


class Planted:
    """Tokens around planted centres, four heads of 16: queries are the keys, values go with them."""

    def __init__(self, centres: int, seed: int, width: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.width = width
        self.centres, self.values = torch.randn(2, 4, centres, width, generator=self.generator)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Queries and values `(1, 4, n, 16)` of another sequence."""
        g, head = self.generator, torch.arange(4)[:, None]
        member = torch.randint(self.centres.shape[1], (4, n), generator=g)
        noise = torch.randn(2, 4, n, self.width, generator=g)
        q, v = self.centres[head, member] + noise[0], self.values[head, member] + noise[1] / 2
        return q[None], v[None]


@torch.no_grad()
def planted(
    n: int = 1024, clusters: int = 32, window: int = 64, steps: int = 60, seeds: int = 3
) -> list[dict[str, Any]]:
    """Relative error against full attention, and tokens in no cluster, before and after learning."""
    found: dict[str, list[tuple[float, float]]] = {"random": [], "learned": []}
    start = time.perf_counter()
    for seed in range(seeds):
        torch.manual_seed(1000 + seed)
        task = Planted(clusters, seed)
        module = RoutingAttention(4, task.width, clusters, window, decay=0.9, share_qk=True)
        random = module.means.clone()
        for _ in range(steps):
            q, v = task.draw(n)
            module(q, None, v)
        q, v = task.draw(n)
        near = route_norm(q)
        exact = attend(near, near, v, scale=1.0)
        for name, means in (("random", random), ("learned", module.means)):
            out = routing_attention(q, None, v, means, window, share_qk=True)
            lists = routing_lists(near, means, window).flatten(2)
            missed = 1 - torch.zeros(1, 4, n).scatter_(2, lists, 1.0).mean()
            error = float((out - exact).norm() / exact.norm())
            found[name].append((error, float(missed)))
    rows = []
    for name, pairs in found.items():
        error, missed = (sum(x) / seeds for x in zip(*pairs, strict=True))
        note = f"relative error {error:.3f}; {missed:.1%} of the tokens in no cluster"
        title = f"planted, N={n}, {clusters} clusters of {window}: {name} centroids"
        rows.append(row(title, time.perf_counter() - start, None, None, note))
    return rows


def growth(
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536),
) -> list[dict[str, Any]]:
    """Products of queries with keys and with centroids; `C = w = floor(sqrt(N))`, one head."""
    start = time.perf_counter()
    pairs, routed = [], []
    for n in sizes:
        side = math.isqrt(n)
        g = torch.Generator().manual_seed(n)
        q, v = torch.randn(2, 1, 1, n, 4, generator=g)
        means = route_norm(torch.randn(1, side, 4, generator=g))
        with counted(routing_clusters) as count, torch.no_grad():
            routing_attention(q, None, v, means, side, share_qk=True)
        pairs.append(count.pairs)
        routed.append(n * side)
    work = [a + b for a, b in zip(pairs, routed, strict=True)]
    note = (
        f"pairs grow as N^{slope(sizes, pairs):.2f}, with the routing N^{slope(sizes, work):.2f}; "
        f"{work[0] / sizes[0] ** 1.5:.2f} to {work[-1] / sizes[-1] ** 1.5:.2f} of N^1.5, the "
        f"stated form; {sizes[-1] ** 2 / work[-1]:.0f} times fewer than all pairs at the end"
    )
    name = f"growth over N={sizes[0]}..{sizes[-1]}, C = w = sqrt(N)"
    return [row(name, time.perf_counter() - start, None, None, note)]


def decoding(
    lengths: tuple[int, ...] = (256, 1024, 2048), clusters: int = 16, window: int = 32
) -> list[dict[str, Any]]:
    """Keys that a decoding step reads, the last 64 steps on average, and keys that are held."""
    start = time.perf_counter()
    g = torch.Generator().manual_seed(0)
    means = route_norm(torch.randn(2, clusters, 16, generator=g))
    cache, read = routing_cache.RoutingCache(means, window), []
    for before, n in zip((0, *lengths), lengths, strict=False):
        q, v = torch.randn(2, 1, 2, n - before, 16, generator=g)
        cache.attend(q[:, :, :-64], None, v[:, :, :-64])
        with counted(routing_cache) as count:
            cache.attend(q[:, :, -64:], None, v[:, :, -64:])
        read.append(count.pairs / 64 / 2)
    note = (
        f"{', '.join(f'{x:.0f}' for x in read)} keys a step and head after "
        f"{', '.join(map(str, lengths))} tokens; {clusters * window} are held"
    )
    name = f"decoding, {clusters} clusters of {window}"
    return [row(name, time.perf_counter() - start, None, None, note)]


class LocalAndRouted(nn.Module):
    """Half of the heads in local windows, half in clusters, as in the paper's layers.

    Args:
        heads, head_dim: of all heads.
        clusters, window: of the routed half; 0 clusters make all heads local.
        local: earlier tokens that a local head reads.
        learn: whether the centroids move.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        clusters: int,
        window: int,
        local: int = 8,
        learn: bool = True,
    ) -> None:
        super().__init__()
        self.local, self.half, self.learn = SlidingWindow(local), heads // 2, learn
        self.routed: RoutingAttention | None = None
        if clusters:
            self.routed = RoutingAttention(
                heads - self.half, head_dim, clusters, window, decay=0.99, causal=True
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`(B, H, N, D)` each; the commitment loss is not used."""
        if self.routed is None:
            out: Tensor = attend(q, k, v, mask=self.local)
            return out
        near, far = slice(self.half), slice(self.half, None)
        self.routed.train(self.training and self.learn)
        found, _ = self.routed(q[:, far], None, v[:, far])
        return torch.cat([attend(q[:, near], k[:, near], v[:, near], mask=self.local), found], 1)


def recall(steps: int = 600, trials: int = 1024) -> list[dict[str, Any]]:
    """Recall of a marked token 16 to 63 places back; two layers, a window of 8 reaches 16 at most."""
    task, rows = tiny_recall.Recall(), []
    kinds = (
        ("local windows only", 0, True),
        ("half routed, learned centroids", 4, True),
        ("half routed, random centroids", 4, False),
    )
    for name, clusters, learn in kinds:
        start = time.perf_counter()
        model = tiny_recall.train(
            lambda layer, c=clusters, learn=learn: LocalAndRouted(4, 16, c, 16, 7, learn),
            task=task,
            steps=steps,
        )
        share = tiny_recall.accuracy(model, task, trials)
        note = f"{share:.1%} right after {steps} steps (chance {1 / tiny_recall.VALUES:.1%})"
        rows.append(row(f"recall: {name}", time.perf_counter() - start, None, None, note))
    return rows


@torch.no_grad()
def seconds(n: int = 16384) -> list[dict[str, Any]]:
    """Forward pass of one layer, four heads of 64, `C = w = sqrt(N)`, against causal attention."""
    side, g = math.isqrt(n), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, n, 64, generator=g)
    means = route_norm(torch.randn(4, side, 64, generator=g))
    ours, theirs = paired(
        lambda: routing_attention(q, None, v, means, side, causal=True),
        lambda: attend(q, k, v, mask=Causal()),
        repeats=3,
    )
    # Pairs of each cluster up to the diagonal, and products with the centroids at their width.
    work = 4 * (side * side * (side + 1) / 2 + n * side)
    name = f"forward, N={n}, C = w = {side}"
    return [row(name, ours, theirs, 4 * n * (n + 1) / 2 / work, "against causal attention")]


if __name__ == "__main__":
    main((planted, growth, decoding), {"train": recall, "time": seconds}, doc=__doc__)
