"""The core's speed: blocks over SDPA and FlexAttention, layouts, statistics, packed sequences.

    python -m benchmarks.core [--json] [--flex]

Every ratio is measured in one run, both sides warm and called in turn, medians of several.
``--flex`` adds FlexAttention, which compiles for a minute on a CPU.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import BlockLayout, Causal, Sinks, SlidingWindow, attend, attend_packed, attention_stats
from regard.bench.timing import paired, row, seconds
from regard.core.stats import Output

from . import main

H, D = 8, 64


def _qkv(n: int, grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(1, H, n, D, generator=g).requires_grad_(grad) for _ in range(3)]


def _causal_pairs(n: int) -> float:
    return n * (n + 1) / 2


def _random_layout(n: int, block: int, chosen: int) -> BlockLayout:
    g = torch.Generator().manual_seed(0)
    blocks = n // block
    index = torch.rand(1, H, blocks, blocks, generator=g).argsort(-1)[..., :chosen]
    return BlockLayout.from_index(index, n, n, block)


def window(n: int = 4096, width: int = 256) -> list[dict[str, Any]]:
    """A causal window, forward and with backward, over causal SDPA."""
    mask = Causal() & SlidingWindow(width)
    bound = _causal_pairs(n) / (mask.density(n) * n * n)
    rows = []
    q, k, v = _qkv(n)
    ours, theirs = paired(
        lambda: attend(q, k, v, mask=mask, backend="blocks"),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        repeats=9,
    )
    rows.append(
        row(f"window {width}, N={n}: blocks over causal SDPA", ours, theirs, bound, "pairs")
    )
    q, k, v = _qkv(n, grad=True)
    pull = torch.randn_like(q)
    ours, theirs = paired(
        _with_backward(lambda: attend(q, k, v, mask=mask, backend="blocks"), (q, k, v), pull),
        _with_backward(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), pull
        ),
    )
    rows.append(row(f"window {width}, N={n}: forward and backward", ours, theirs, bound, "pairs"))
    return rows


def _with_backward(
    fn: Callable[[], Tensor], inputs: tuple[Tensor, ...], pull: Tensor
) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(fn(), inputs, pull)


def random_blocks(n: int = 8192, block: int = 64, chosen: int = 16) -> list[dict[str, Any]]:
    """Random key blocks, other ones for each head and query block, over causal SDPA."""
    layout = _random_layout(n, block, chosen)
    bound = _causal_pairs(n) / (layout.density * n * n)
    rows = []
    q, k, v = _qkv(n)
    ours, theirs = paired(
        lambda: attend(q, k, v, layout=layout, backend="blocks"),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    name = f"random {chosen} of {n // block} blocks, N={n}"
    rows.append(row(f"{name}: blocks over causal SDPA", ours, theirs, bound, "pairs"))
    q, k, v = _qkv(n, grad=True)
    pull = torch.randn_like(q)
    ours, theirs = paired(
        _with_backward(lambda: attend(q, k, v, layout=layout, backend="blocks"), (q, k, v), pull),
        _with_backward(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), pull
        ),
        repeats=3,
    )
    rows.append(row(f"{name}: forward and backward", ours, theirs, bound, "pairs"))
    return rows


def ceiling() -> list[dict[str, Any]]:
    """What no exact float32 kernel can pass: the products of the random layout at peak speed."""
    n, block, chosen = 8192, 64, 16
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    peak = 2 * 2048**3 / seconds(lambda: a @ b, repeats=15)
    q, k, v = _qkv(n)
    theirs = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    products = 4 * H * n * chosen * block * D / peak
    note = f"its matrix products alone at this machine's {peak / 1e9:.0f} GFLOP/s"
    return [
        row(f"random {chosen} of {n // block} blocks, N={n}: ceiling", products, theirs, None, note)
    ]


def flex(n: int = 4096, width: int = 256) -> list[dict[str, Any]]:
    """The same window over FlexAttention, compiled; its compilation is a row of its own."""
    mask = Causal() & SlidingWindow(width)
    q, k, v = _qkv(n)
    start = time.perf_counter()
    attend(q, k, v, mask=mask, backend="flex")
    first = time.perf_counter() - start
    ours, theirs = paired(
        lambda: attend(q, k, v, mask=mask, backend="blocks"),
        lambda: attend(q, k, v, mask=mask, backend="flex"),
    )
    return [
        row(f"window {width}, N={n}: blocks over FlexAttention", ours, theirs, None, "both sparse"),
        row("first call: blocks over FlexAttention", ours, first, None, "its compilation"),
    ]


def layouts(n: int = 65536, width: int = 256) -> list[dict[str, Any]]:
    """Making a layout over the attention that it serves."""
    mask = Causal() & SlidingWindow(width)
    q, k, v = _qkv(n)
    made = seconds(lambda: mask.layout(n, n, (128, 64)), repeats=5)
    layout = mask.layout(n, n, (128, 64))
    served = seconds(lambda: attend(q, k, v, layout=layout, backend="blocks"), repeats=5)
    note = "the attention it serves over making it; at least 10 is asked for"
    return [row(f"layout of a window {width}, N={n}", made, served, 10.0, note)]


def statistics_cost(n: int = 8192) -> list[dict[str, Any]]:
    """Column mass beside the fast kernel, as a multiple of the kernel alone."""
    q, k, v = _qkv(n)

    def kernel() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> Any:
        return kernel(), attention_stats(q, k, ["received"], mask=Causal())

    def fused() -> Any:
        return attention_stats(q, k, ["received", Output(v)], mask=Causal())

    rows = []
    for what, fn in (
        ("SDPA, then column mass", both),
        ("output and column mass in one pass", fused),
    ):
        ours, theirs = paired(fn, kernel)
        note = f"costs {ours / theirs:.2f} x SDPA alone"
        rows.append(row(f"{what}, causal N={n}", ours, theirs, 1.0, note))
    return rows


_MEMORY = """
import torch
from regard import Causal, attention_stats
from regard.bench.timing import PeakMemory, seconds
torch.manual_seed(0)
q, k = (torch.randn(1, {h}, {n}, {d}) for _ in range(2))
attention_stats(q[:, :, :512], k[:, :, :512], ["received", "entropy"], mask=Causal())
with PeakMemory() as memory:
    stats = lambda: attention_stats(q, k, ["received", "entropy"], mask=Causal())
    taken = seconds(stats, repeats=1, warmup=0)
print(taken, memory.above)
"""


def statistics_memory(n: int = 32768) -> list[dict[str, Any]]:
    """Peak memory of column mass and entropy above the inputs, in a fresh process."""
    taken, above = _fresh(_MEMORY.format(h=H, n=n, d=D)).split()
    matrix = 4 * H * n * n / 1e9
    note = f"{int(above) / 1e6:.0f} MB above the inputs; the matrix would be {matrix:.0f} GB"
    return [row(f"column mass and entropy, causal N={n}", float(taken), None, None, note)]


def _fresh(code: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def packed() -> list[dict[str, Any]]:
    """Sequences of skewed lengths: packed over padded."""
    g = torch.Generator().manual_seed(0)
    lengths = (1024 * torch.rand(16, generator=g) ** 3).long().clamp(min=16)
    lengths[0] = 1024
    longest, total = int(lengths.max()), int(lengths.sum())
    bound = len(lengths) * longest**2 / float((lengths.double() ** 2).sum())
    cu = F.pad(lengths.cumsum(0), (1, 0))
    x = torch.randn(3, total, H, D, generator=g)
    padded = torch.zeros(3, len(lengths), H, longest, D)
    for at, length in enumerate(lengths.tolist()):
        padded[:, at, :, :length] = x[:, cu[at] : cu[at + 1]].transpose(1, 2)
    valid = (torch.arange(longest) < lengths[:, None])[:, None, None]
    ours, theirs = paired(
        lambda: attend_packed(x[0], x[1], x[2], cu),
        lambda: F.scaled_dot_product_attention(*padded, attn_mask=valid),
    )
    note = f"16 sequences, mean {total / 16:.0f} of {longest}"
    return [row("packed over padded SDPA", ours, theirs, bound, note)]


def streaming(n: int = 8192) -> list[dict[str, Any]]:
    """Window and sinks, whose keys lie in two stretches."""
    mask = Causal() & (SlidingWindow(1024) | Sinks(4))
    q, k, v = _qkv(n)
    bound = _causal_pairs(n) / (mask.density(n) * n * n)
    ours, theirs = paired(
        lambda: attend(q, k, v, mask=mask),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    return [row(f"window 1024 and 4 sinks, N={n}: auto over causal SDPA", ours, theirs, bound, "")]


def imports() -> list[dict[str, Any]]:
    """Seconds that ``import regard`` adds to ``import torch``, in fresh processes."""
    rows = []
    for what in ("import regard", "import regard; regard.attend"):
        code = (
            f"import time, torch; t = time.perf_counter(); {what}; print(time.perf_counter() - t)"
        )
        taken = statistics.median(float(_fresh(code)) for _ in range(3))
        rows.append(row(f"{what}, after torch", taken, None, None, "0.2 s is the limit"))
    return rows


BENCHMARKS = (
    window,
    random_blocks,
    ceiling,
    streaming,
    layouts,
    statistics_cost,
    statistics_memory,
    packed,
    imports,
)

if __name__ == "__main__":
    main(BENCHMARKS, {"flex": flex}, __doc__)
