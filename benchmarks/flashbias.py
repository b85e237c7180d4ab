"""FlashBias (arXiv 2505.12044): a bias as extra channels against a dense one.

    python -m benchmarks.flashbias [--json] [--only pde|swin|alphafold|...]

The paper's claim: the same outputs without the N x M bias, at the cost of plain attention; and biases
of practice have a low rank. Its cost: time O(N M (D + R)), extra memory O((N + M) R). Three examples
stand for the paper's: spatial distances on a point cloud (exact), relative-position tables of Swin
windows (decomposed), the pair bias of AlphaFold (learnt), on small data made by
`benchmarks/flashbias_data.py`. Errors are relative, of the scores and of the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import ALiBi, Causal, attend
from regard.bench.timing import paired, row, seconds
from regard.patterns.flashbias import (
    RankError,
    alibi_factors,
    factored_bias_attention,
    pair_features,
    rank_curve,
    sqdist_factors,
    svd_factors,
    train_factors,
)

from . import main
from .flashbias_data import chains, cloud, denoised_table, relative_bias, window_tables

H, D = 8, 64


def _qkv(n: int, batch: int = 1, heads: int = H, width: int = D) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(batch, heads, n, width, generator=g) for _ in range(3)]


def _dense_bias(n: int) -> Tensor:
    """Causal ALiBi as one would write it for SDPA, `(H, n, n)`."""
    at = torch.arange(n)
    bias = ALiBi.for_heads(H).slopes[:, None, None] * (at - at[:, None]).float()
    return bias.masked_fill_(at > at[:, None], -math.inf)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def alibi(n: int = 4096) -> list[dict[str, Any]]:
    """ALiBi factored, over making the bias and handing it to SDPA, and over no bias at all."""
    q, k, v = _qkv(n)

    def factored() -> Tensor:
        return factored_bias_attention(q, k, v, *alibi_factors(n, n, H), causal=True)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_dense_bias(n))

    gap = (factored() - dense()).abs().max().item()
    ours, theirs = paired(factored, dense, repeats=3)
    factors = sum(x.untyped_storage().nbytes() for x in alibi_factors(n, n, H)) / 1e6
    note = f"{4 * H * n * n / 1e6:.0f} MB of bias, {factors:.1f} MB of factors; gap {gap:.0e}"
    rows = [row(f"ALiBi N={n}: factored over dense bias", ours, theirs, None, note)]
    ours, theirs = paired(factored, lambda: attend(q, k, v, mask=Causal()), repeats=3)
    note = "what the bias costs: 1 means nothing"
    return [*rows, row(f"ALiBi N={n}: over no bias", ours, theirs, 1.0, note)]


def ranks(side: int = 12) -> list[dict[str, Any]]:
    """Rank that keeps 99.5 % of the energy of a window's bias: smooth and random tables."""
    smooth, random = window_tables(side)
    found = [svd_factors(bias)[0].shape[-1] for bias in (smooth, random)]
    note = f"rank {found[0]} of {side**2} for -distance, {found[1]} for a random table"
    taken = seconds(lambda: svd_factors(smooth))
    return [row(f"rank at 99.5 % energy, {side} x {side} window", taken, None, None, note)]


def pde(n: int = 2048, steps: int = 60) -> list[dict[str, Any]]:
    """Spatial distances on a point cloud in 2-D and 3-D: forward, backward, and training."""
    rows = []
    for dims in (2, 3):
        x, weight, _ = cloud(n, dims, H)
        q, k, v = _qkv(n)
        pull = torch.randn(1, H, n, D, generator=torch.Generator().manual_seed(1))

        def factored(x: Tensor, w: Tensor, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return factored_bias_attention(q, k, v, *sqdist_factors(x, x, w))

        def dense(x: Tensor, w: Tensor, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            bias = -w * (x[..., :, None, :] - x[..., None, :, :]).square().sum(-1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        def grads(fn: Any, x: Tensor = x, w: Tensor = weight, pull: Tensor = pull) -> Any:
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            return torch.autograd.grad(fn(*leaves), leaves, pull)

        gap = _relative(factored(x, weight), dense(x, weight))
        names = f"PDE: distances of {n} points in {dims}-D"
        ours, theirs = paired(
            lambda f=factored, x=x, w=weight: f(x, w), lambda f=dense, x=x, w=weight: f(x, w), 3
        )
        phi_q, phi_k = sqdist_factors(x, x, weight)
        scores = _relative(phi_q @ phi_k.mT, -weight * torch.cdist(x, x).square())
        note = f"rank {dims + 2}, exact; error {scores:.0e} of scores, {gap:.0e} of output"
        rows.append(row(f"{names}: over dense bias", ours, theirs, None, note))
        gap = max(_relative(a, b) for a, b in zip(grads(factored), grads(dense), strict=True))
        ours, theirs = paired(lambda f=factored: grads(f), lambda f=dense: grads(f), 3)
        note = f"gradients of coordinates and weights, largest error {gap:.0e}"
        rows.append(row(f"{names}: forward and backward", ours, theirs, None, note))
    return [*rows, _solver(n // 4, steps)]


def _solver(n: int, steps: int) -> dict[str, Any]:
    """Learns how far to look: weights of the distances that smooth a noisy field."""
    x, _, field = cloud(n, 2, 1)
    noisy = field + 0.5 * torch.randn(field.shape, generator=torch.Generator().manual_seed(2))
    flat = torch.zeros(1, 1, n, 8)
    reach = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([reach], lr=0.2)
    losses = []

    def step() -> None:
        factors = sqdist_factors(x, x, reach.exp())
        loss = (factored_bias_attention(flat, flat, noisy, *factors) - field).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())

    for _ in range(steps - 1):
        step()
    taken = seconds(step, repeats=1, warmup=0)
    note = (
        f"squared error {losses[0]:.3f} before and {losses[-1]:.3f} after {steps} steps of the "
        f"weight to {reach.exp().item():.0f}; the noise has {(noisy - field).square().mean():.3f}"
    )
    return row(f"PDE: a field on {n} points, one step of training", taken, None, None, note)


def swin(side: int = 12, steps: int = 150, windows: int = 16) -> list[dict[str, Any]]:
    """Relative-position tables of Swin windows: smooth, learnt by denoising, random.

    The rank that keeps 99.5 % of the energy does not know how sharply the table attends, nor that a
    softmax ignores a constant of a row: `-distance / 10` has the same rank and a smaller error of
    the output; with its rows centred, the energy counts what matters.
    """
    smooth, random = window_tables(side)
    learnt = relative_bias(denoised_table(side, steps), side)
    n = side**2
    q, k, v = _qkv(n, windows, 4, 32)
    rows = []
    centred = smooth - smooth.mean(-1, keepdim=True)
    tables = {
        "-distance": smooth,
        "-distance / 10": smooth / 10,
        "-distance / 10, rows centred": centred / 10,
        "learnt table": learnt,
        "random table": random,
    }
    for name, bias in tables.items():
        phi_q, phi_k = svd_factors(bias)
        rank = phi_q.shape[-1]
        (at,) = rank_curve(bias, q, k, v, (rank,))
        full = bias.expand(4, n, n).contiguous()
        ours, theirs = paired(
            lambda a=phi_q, b=phi_k: factored_bias_attention(q, k, v, a, b),
            lambda b=full: F.scaled_dot_product_attention(q, k, v, attn_mask=b),
        )
        label = f"Swin: {name}, {windows} windows of {side} x {side}"
        rows.append(row(label, ours, theirs, None, f"99.5 % energy, {_errors(at)}"))
    return rows


def curve(side: int = 12) -> list[dict[str, Any]]:
    """Rank against error, of the scores and of the output, for smooth tables and a random one."""
    rows = []
    for name, points in rank_curves(side).items():
        for at in points:
            note = f"{_errors(at)}; energy {at.energy:.2%}"
            q, k, v = _qkv(side**2, 1, 1, 32)
            phi = torch.ones(side**2, at.rank)
            taken = seconds(
                lambda q=q, k=k, v=v, phi=phi: factored_bias_attention(q, k, v, phi, phi), 3
            )
            rows.append(row(f"curve of {name}, rank {at.rank}", taken, None, None, note))
    return rows


def rank_curves(side: int = 12) -> dict[str, list[RankError]]:
    """The curves of :func:`curve`, which `benchmarks/pictures.py` draws."""
    q, k, v = _qkv(side**2, 4, 1, 32)
    shown = [*(r for r in (1, 2, 3, 5, 8, 16, 32, 64, 120) if r < side**2), side**2]
    smooth, random = window_tables(side)
    tables = {"-distance": smooth, "-distance / 10": smooth / 10, "a random table": random}
    return {name: rank_curve(bias, q, k, v, shown) for name, bias in tables.items()}


def _errors(at: RankError) -> str:
    return f"rank {at.rank}, error {at.scores:.1%} of scores and {at.output:.1%} of output"


def alphafold(
    residues: int = 48, examples: int = 96, rank: int = 16, steps: int = 2000
) -> list[dict[str, Any]]:
    """A pair bias that changes with the input, learnt from row and column means and single features.

    Triangle attention: every row of the pair tensor attends over the chain under one bias.
    """
    pair, single, bias = chains(examples, residues)
    zq, zk = pair_features(pair, single)
    held = examples // 8
    network, losses = train_factors(
        zq[held:],
        zk[held:],
        bias[held:],
        rank=rank,
        hidden=128,
        steps=steps,
        lr=6e-3,
        generator=torch.Generator().manual_seed(0),
    )
    heads = bias.shape[1]
    q, k, v = _qkv(residues, residues, heads, 16)
    want, seen = bias[:1], (zq[:1], zk[:1])
    rows = []
    with torch.no_grad():
        learnt = [phi[:1] for phi in network(*seen)]
        unseen = [phi for phi in network(zq[:held], zk[:held])]
        scores = _relative(unseen[0] @ unseen[1].mT, bias[:held])

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=want)

        def factored() -> Tensor:
            return factored_bias_attention(q, k, v, *learnt)

        ours, theirs = paired(factored, dense)
        # The best that any factors of this rank could do, and no bias at all, for comparison.
        (best,) = rank_curve(want.expand(1, heads, -1, -1), q[:1], k[:1], v[:1], (rank,))
        none = _relative(attend(q, k, v), dense())
        note = (
            f"rank {rank}, chains not seen in training: error {scores:.1%} of scores and "
            f"{_relative(factored(), dense()):.1%} of output (SVD of this rank: {best.scores:.1%} and "
            f"{best.output:.1%}; no bias: 100% and {none:.1%}); loss {losses[0]:.2f} to "
            f"{losses[-1]:.3f} in {steps} steps"
        )
        rows.append(row(f"AlphaFold: pair bias of {residues} residues", ours, theirs, None, note))
    return rows


def growth(sizes: tuple[int, ...] = (1024, 2048, 4096)) -> list[dict[str, Any]]:
    """Growth with N, as slopes of log over log: time 2, memory of the factors 1 (dense: 2)."""
    taken, held = [], []
    for n in sizes:
        q, k, v = _qkv(n)
        phi_q, phi_k = alibi_factors(n, n, H)
        taken.append(
            seconds(lambda x=(q, k, v, phi_q, phi_k): factored_bias_attention(*x, causal=True))
        )
        held.append(phi_q.untyped_storage().nbytes() + phi_k.untyped_storage().nbytes())
    time, memory = _slope(sizes, taken), _slope(sizes, held)
    note = f"time grows as N^{time:.2f} (stated 2), factors as N^{memory:.2f} (stated 1)"
    return [row(f"growth over N={sizes[0]}..{sizes[-1]}", taken[-1], None, None, note)]


def _slope(x: tuple[int, ...], y: list[Any]) -> float:
    return math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])


if __name__ == "__main__":
    main((alibi, ranks, pde, swin, curve, alphafold, growth), doc=__doc__)
