"""Sparsifiner (arXiv 2303.13755): how much attention its predicted keys keep, and what they cost.

    python -m benchmarks.sparsifiner [--json] [--only growth|flops] [--train]

The paper's claims: keys that depend on the image keep more of the attention than any one mask, and
48 to 69 % of the operations of the attention layers are saved for less than 0.4 points of accuracy.
`--train` fits predictors to frozen layers (65 tokens, a quarter of the keys) and compares the share of
the attention that their keys keep with that of the best mask for all images and of the best keys for
each image. Where attention follows objects, the predictor wins; where it follows places alone, one mask
is right and the predictor, whose rank is a sixth of the tokens, loses (half a minute together).
Seconds are those of working a figure out, of training in the rows of `--train`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.timing import row
from regard.core.masks import Full
from regard.core.select import chosen_layout
from regard.sparse.sparsifiner import ConnectivityPredictor, SparsifinerAttention
from regard.sparse.sparsifiner_keys import sparse_basis, sparse_coefficients
from regard.sparse.sparsifiner_train import reconstruction_loss

from . import main
from .counted import slope

SIDE, WIDTH, HEADS = 8, 64, 4
TOKENS = SIDE * SIDE + 1

Images = Callable[[int, torch.Generator], Tensor]


def frozen(
    objects: int = 2, extent: int = 2, kinds: int = 6, place: float = 0.2
) -> tuple[SparsifinerAttention, Images]:
    """A layer whose attention is fixed, and images for it.

    An image has `objects` squares of `extent` patches at random places. Queries look for what objects
    have in common, and for their own kind. `place` is the size of the part of a token that says where
    it is; with no objects that is all that attention follows.
    """
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    places, kinds_of, common = rand(TOKENS, WIDTH) * place, rand(kinds, WIDTH), rand(WIDTH)
    layer = SparsifinerAttention(WIDTH, TOKENS, HEADS)
    with torch.no_grad():
        weight = rand(WIDTH, WIDTH) / WIDTH**0.5
        layer.qkv.weight[: 2 * WIDTH] = torch.cat([weight, weight])
        layer.qkv.bias.zero_()
        if objects:
            layer.qkv.bias[:WIDTH] = weight @ common
    y, x = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE

    def images(size: int, generator: torch.Generator) -> Tensor:
        out = torch.randn(size, TOKENS, WIDTH, generator=generator) * 0.3 + places
        for _ in range(objects):
            top, left = torch.randint(SIDE - extent + 1, (2, size, 1), generator=generator)
            inside = (y >= top) & (y < top + extent) & (x >= left) & (x < left + extent)
            inside = torch.cat([inside.new_zeros(size, 1), inside], dim=1)
            kind = kinds_of[torch.randint(kinds, (size,), generator=generator)]
            out = torch.where(inside[..., None], out + kind[:, None] + common, out)
        return out

    return layer, images


def kept(attention: Tensor, mask: Tensor) -> float:
    """Mean share of the rows' attention that a mask keeps, the class token's row left out."""
    return float((attention * mask)[..., 1:, :].sum(-1).mean())


def best(attention: Tensor, budget: int) -> Tensor:
    """The mask of the `budget` largest weights of each row."""
    at = attention.topk(budget, dim=-1).indices
    return torch.zeros_like(attention, dtype=torch.bool).scatter_(-1, at, True)


def fit(
    layer: SparsifinerAttention, images: Images, *, steps: int = 800, rate: float = 1e-2
) -> dict[str, float]:
    """Train the layer's predictor; shares of attention kept on images that it has not seen."""
    torch.manual_seed(0)
    predictor, generator = layer.mask_predictor, torch.Generator().manual_seed(1)
    with torch.no_grad():
        test = images(128, torch.Generator().manual_seed(2))
        truth = layer.reconstruct(test).attention
        q, k, _ = layer.heads_of(test)
        mean = torch.stack(
            [layer.reconstruct(images(64, generator)).attention.mean(0) for _ in range(16)]
        ).mean(0)
        found = {
            "predictor at the start": kept(truth, predictor(q, k)[1]),
            "best mask for all images": kept(truth, best(mean, predictor.budget)),
            "best keys of each image": kept(truth, best(truth, predictor.budget)),
        }
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        learned = layer.reconstruct(images(32, generator))
        loss = reconstruction_loss([learned.score], [learned.attention])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"  step {step + 1}/{steps}: loss {loss.item():.3f}", file=sys.stderr)
    with torch.no_grad():
        found["predictor"] = kept(truth, predictor(q, k)[1])
    return found


def train(steps: int = 800) -> list[dict[str, Any]]:
    """Fit predictors to frozen attention and compare what they keep."""
    rows = []
    for name, options in (
        ("objects", {}),
        ("places alone", {"objects": 0, "place": 1.0}),
    ):
        start = time.perf_counter()
        found = fit(*frozen(**options), steps=steps)
        note = ", ".join(f"{what} {share:.3f}" for what, share in found.items())
        taken = time.perf_counter() - start
        rows.append(row(f"a quarter of the keys, {name}", taken, None, None, note))
    return rows


@torch.no_grad()
def work(tokens: int, dim_head: int = 64, keep: float = 0.25) -> dict[str, int]:
    """Multiplications of one head's predictor and attention, counted on random images.

    The product of coefficients and basis counts pairs of entries that are both not 0.
    """
    torch.manual_seed(0)
    layer = SparsifinerAttention(dim_head, tokens, 1, keep=keep)
    # A trained basis is sparse; this one keeps the half of its entries above the median.
    layer.mask_predictor.proj_back_n.mul_(0.02 / 0.0135)
    predictor = layer.mask_predictor
    q, k, _ = layer.heads_of(torch.randn(1, tokens, dim_head))
    with FlopCounterMode(display=False) as counter:
        found = predictor.coefficients(q, k)
    coefficients = sparse_coefficients(found, predictor.basis_topk)
    # Pairs by the basis vector that joins them: no N x N table of the pairs is made.
    rows, columns = (
        (x != 0).flatten(end_dim=-2).sum(0)
        for x in (coefficients, sparse_basis(predictor.proj_back_n))
    )
    _, mask = predictor(q, k)
    listed = chosen_layout(mask, tokens, tokens, 1, Full()).listed_pairs()
    return {
        "low rank": counter.get_total_flops() // 2,
        "product": int((rows * columns).sum()),
        "attention": 2 * listed * dim_head,
        "dense": 2 * tokens * tokens * dim_head,
    }


def growth(sides: tuple[int, ...] = (46, 64, 90), keep: float = 0.25) -> list[dict[str, Any]]:
    """Operations over N, and over the stated `N D^2 + N n' D` (two products of width D / 2) and
    `2 keep N^2 D`. Every part is quadratic in the end, at a share of dense attention's.

    The choice is made among N x N predicted scores, which sets the end of the range.
    """
    start = time.perf_counter()
    sizes, width = [side * side + 1 for side in sides], 64
    found = [work(n, width, keep) for n in sizes]
    stated = {
        "low rank": [_low_rank(n, width) for n in sizes],
        "attention": [2 * keep * n * n * width for n in sizes],
    }
    ratios = {
        part: [one[part] / s for one, s in zip(found, form, strict=True)]
        for part, form in stated.items()
    }
    grown = ", ".join(
        f"{part} N^{slope(sizes, [one[part] for one in found]):.2f}" for part in found[0]
    )
    last = found[-1]
    shares = ", ".join(
        f"{part} {last[part] / last['dense']:.3f}" for part in last if part != "dense"
    )
    over = ", ".join(f"{part} {min(x):.3f} to {max(x):.3f}" for part, x in ratios.items())
    forms = ", ".join(f"{part} N^{slope(sizes, form):.2f}" for part, form in stated.items())
    note = (
        f"{grown} (stated {forms}); over the stated form: {over}; of dense at N={sizes[-1]}: {shares}; "
        "longer would need a choice among more N x N scores than memory holds"
    )
    name = f"growth over N={sizes[0]}..{sizes[-1]}, keep={keep}"
    return [row(name, time.perf_counter() - start, None, None, note)]


def _low_rank(n: int, width: int) -> float:
    """The stated `N D^2 + N n' D`."""
    return n * width * width + n * (n // 6) * width


@torch.no_grad()
def growth_predictor(
    sides: tuple[int, ...] = (46, 64, 90, 128, 181, 256), width: int = 64
) -> list[dict[str, Any]]:
    """Operations of the coefficients alone, on tensors without storage."""
    start = time.perf_counter()
    sizes, found = [side * side + 1 for side in sides], []
    for n in sizes:
        with torch.device("meta"):
            predictor, x = ConnectivityPredictor(width, 1, n), torch.empty(1, 1, n, width)
        with FlopCounterMode(display=False) as counter:
            predictor.coefficients(x, x)
        found.append(counter.get_total_flops() // 2)
    stated = [_low_rank(n, width) for n in sizes]
    note = (
        f"low rank N^{slope(sizes, found):.2f} (stated N D^2 + N n' D, N^{slope(sizes, stated):.2f}); "
        f"{found[-1] / (2 * sizes[-1] ** 2 * width):.3f} of dense attention at the end"
    )
    name = f"growth of the coefficients over N={sizes[0]}..{sizes[-1]}"
    return [row(name, time.perf_counter() - start, None, None, note)]


def flops(tokens: int = 197, dim: int = 384, heads: int = 6) -> list[dict[str, Any]]:
    """Operations of an attention layer of DeiT-S, projections included, over the dense one's."""
    rows = []
    for keep in (0.25, 0.1):
        start = time.perf_counter()
        found = work(tokens, dim // heads, keep)
        dense = 4 * tokens * dim * dim + heads * found["dense"]
        scores = heads * (found["dense"] - sum(found[x] for x in found if x != "dense"))
        note = (
            f"{scores / dense:.1%} fewer with the projections, {scores / heads / found['dense']:.1%} "
            "without (published, attention layers: 48 to 69 %)"
        )
        taken = time.perf_counter() - start
        rows.append(row(f"DeiT-S, {tokens} tokens, keep={keep}", taken, None, None, note))
    return rows


if __name__ == "__main__":
    main((growth, growth_predictor, flops), {"train": train}, doc=__doc__)
