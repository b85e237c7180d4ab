"""Streamed statistics against a dense float64 softmax written with plain torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard import Causal, Dense, Full, Keys, PerHead, Sinks, SlidingWindow
from regard.core import stat_walk
from regard.core.bias import ALiBi, DenseBias, LowRankBias
from regard.core.layout import BlockLayout
from regard.core.stats import (
    Distance,
    Entropy,
    MassByDistance,
    MassOn,
    MaxWeight,
    Output,
    Pooled,
    Received,
    SpanMass,
    Statistic,
    TopK,
    Window,
    WindowedDistance,
    attention_stats,
)


def rand(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=dtype)


def dense_weights(q, k, allowed=None, bias=None, scale=None):
    """(B, H, N, M) by the definition; rows without keys are 0."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias.double()
    if allowed is not None:
        s = s.masked_fill(~allowed, -math.inf)
    return torch.softmax(s, -1).nan_to_num(0.0), torch.logsumexp(s, -1)


def band(n, m, left):
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    return (j <= i) & ((j >= i - left) | (j < 2))


# name: (B, H, Hkv, N, M, mask, allowed pairs written with plain torch)
def cases():
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[0, 29:] = False
    valid[1, :11] = False
    hole = torch.rand(21, 37, generator=torch.Generator().manual_seed(5)) > 0.5
    hole[3] = False
    hole[20] = False
    every = torch.ones(40, 40, dtype=torch.bool)
    return {
        "full": (2, 3, 3, 21, 37, None, None),
        "causal": (2, 4, 2, 40, 40, Causal(), every.tril()),
        "decode": (1, 4, 2, 1, 37, Causal(), every[:1, :37]),
        "causal_cache": (1, 3, 1, 21, 37, Causal(), every[:21, :37].tril(16)),
        "window_sinks": (
            2,
            2,
            2,
            33,
            70,
            Causal() & (SlidingWindow(9) | Sinks(2)),
            band(33, 70, 9),
        ),
        "per_head": (
            2,
            4,
            2,
            40,
            40,
            PerHead((Causal(), SlidingWindow(3), Causal(), SlidingWindow(0))),
            torch.stack([every.tril(), every.tril().triu(-3), every.tril(), every.tril().triu(0)]),
        ),
        "padding": (
            2,
            4,
            2,
            37,
            37,
            Causal() & Keys(valid),
            (every[:37, :37].tril() & valid[:, None])[:, None],
        ),
        "empty_rows": (2, 2, 1, 21, 37, Dense(hole), hole),
        "one": (1, 1, 1, 1, 1, Causal(), every[:1, :1]),
    }


def everything(m):
    return [
        Received(),
        Received(mean=True, name="received_mean"),
        Entropy(),
        Entropy(normalized=True, name="entropy_normalized"),
        MaxWeight(),
        MassOn([0, m - 1, m // 2]),
        MassOn(torch.arange(m) % 3 == 0, name="mass_third"),
        Distance(),
        WindowedDistance(5),
        MassByDistance([-40, -3, 0, 1, 2, 8, 20]),
        TopK(3),
        SpanMass({"head": [(0, m // 3)], "ends": [(0, 1), (m - 1, m)], "none": []}),
        Window((m // 4, m), (0, m // 2 + 1)),
        Pooled(4),
        Pooled(3, (0, m), (m // 2, m), name="pooled_part"),
    ]


def by_hand(p, n, m, allowed):
    """All statistics of dense weights, each by its formula."""
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    gap = (i - j).double()
    seen = torch.ones(n, m).double() if allowed is None else allowed.double()
    seen = seen.expand(*p.shape)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    visible = seen.sum(-1)
    member = torch.zeros(m, 3).double()
    member[: m // 3, 0] = 1
    member[0, 1] = member[m - 1, 1] = 1
    rows = p @ member
    inside = member[m - n :]
    edges = [-40, -3, 0, 1, 2, 8, 20]
    top = p.topk(min(3, m), -1)
    pad = (0, 3 - min(3, m))
    window = torch.zeros(*p.shape[:2], m - m // 4, m // 2 + 1).double()
    first = max(m // 4, m - n)
    window[:, :, first - m // 4 :] = p[:, :, first - (m - n) :, : m // 2 + 1]
    bins = list(itertools.pairwise(edges))

    def pooled(width, left):
        # Rows by position; those before position 0 belong to no bin.
        whole = torch.zeros(*p.shape[:2], m, m - left).double()
        held = torch.zeros(m).double()
        whole[:, :, max(0, m - n) :] = p[:, :, max(0, n - m) :, left:]
        held[max(0, m - n) :] = 1
        rows = [
            torch.stack([c.sum((2, 3)) for c in r.split(width, 3)], -1) / max(1, float(h.sum()))
            for r, h in zip(whole.split(width, 2), held.split(width), strict=True)
        ]
        return torch.stack(rows, 2)

    return {
        "received": p.sum(2),
        "received_mean": p.sum(2) / seen.sum(2).clamp(min=1),
        "entropy": entropy,
        "entropy_normalized": torch.where(visible > 1, entropy / visible.log(), 0.0),
        "max_weight": p.amax(-1),
        "mass_on": p[..., sorted({0, m - 1, m // 2})].sum(-1),
        "mass_third": p[..., ::3].sum(-1),
        "distance": (p * gap).sum(-1),
        "windowed_distance": (p * gap.clamp(max=5)).sum(-1),
        "mass_by_distance": torch.stack(
            [(p * ((gap >= a) & (gap < b))).sum((2, 3)) / n for a, b in bins], -1
        ),
        "topk_weights": torch.nn.functional.pad(top.values, pad),
        "topk_keys": torch.nn.functional.pad(
            top.indices.masked_fill(top.values == 0, -1), pad, value=-1
        ),
        "span_mass": torch.einsum("na,bhns->bhas", inside, rows)
        / inside.sum(0).clamp(min=1)[:, None],
        "span_mass_rows": rows,
        "window": window,
        "pooled": pooled(4, 0),
        "pooled_part": pooled(3, m // 2),
    }


def agree(got, want, tol=1e-10):
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name].to(value.dtype), value, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("tile", [7, 16, 128])
def test_every_statistic_equals_the_dense_one(name, tile):
    b, h, hkv, n, m, mask, allowed = cases()[name]
    q, k = rand(b, h, n, 8, seed=1), rand(b, hkv, m, 8, seed=2)
    p, _ = dense_weights(q, k, allowed)
    got = attention_stats(q, k, everything(m), mask=mask, tile=tile)
    agree(got, by_hand(p, n, m, allowed))


@pytest.mark.parametrize("budget", [1, 50, 700, 3000])
@pytest.mark.parametrize("name", ["full", "causal", "padding", "per_head"])
def test_any_budget_gives_the_same(name, budget, monkeypatch):
    monkeypatch.setattr(stat_walk, "_BUDGET", {"cpu": budget, "cuda": budget})
    monkeypatch.setattr(stat_walk, "_LEAST_ROWS", 4)
    b, h, hkv, n, m, mask, allowed = cases()[name]
    q, k = rand(b, h, n, 8, seed=1), rand(b, hkv, m, 8, seed=2)
    p, _ = dense_weights(q, k, allowed)
    agree(attention_stats(q, k, everything(m), mask=mask, tile=16), by_hand(p, n, m, allowed))


def test_half_precision_is_computed_in_float32():
    q, k = rand(1, 2, 40, 8, seed=1).bfloat16(), rand(1, 2, 40, 8, seed=2).bfloat16()
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()
    p, _ = dense_weights(q, k, allowed)
    got = attention_stats(q, k, everything(40), mask=Causal())
    assert got["received"].dtype == torch.float32
    want = by_hand(p, 40, 40, allowed)
    keep = [x for x in want if not x.startswith("topk")]
    agree({x: got[x] for x in keep}, {x: want[x] for x in keep}, tol=2e-5)


def test_distances_keep_their_precision_far_from_zero():
    # A query that looks at itself and its neighbour, 200,000 tokens into a sequence.
    m = 200_000
    q, k = torch.full((1, 1, 1, 1), 60.0), torch.zeros(1, 1, m, 1)
    k[0, 0, -3:] = 1.0
    got = attention_stats(q, k, ["distance"], mask=Causal())["distance"]
    assert abs(got.item() - 1.0) < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseBias(rand(40, 40, seed=3)),
        lambda: DenseBias(rand(2, 4, 40, 40, seed=3)),
        lambda: ALiBi(rand(4, seed=4)),
        lambda: LowRankBias(rand(4, 40, 2, seed=5), rand(2, 40, 2, seed=6).view(2, 1, 40, 2)),
        lambda: LowRankBias(rand(4, 40, 2, seed=5), rand(4, 40, 2, seed=6)),
    ],
)
def test_bias(make):
    bias = make()
    q, k = rand(2, 4, 40, 8, seed=1), rand(2, 2, 40, 8, seed=2)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()
    i, j = torch.arange(40)[:, None], torch.arange(40)[None]
    h, b = torch.arange(4).view(1, 4, 1, 1), torch.arange(2).view(2, 1, 1, 1)
    p, _ = dense_weights(q, k, allowed, bias.scores(i, j, h, b))
    got = attention_stats(q, k, everything(40), mask=Causal(), bias=bias, tile=16)
    agree(got, by_hand(p, 40, 40, allowed))


def test_bias_that_empties_rows():
    bias = torch.zeros(40, 40, dtype=torch.float64)
    bias[5] = -math.inf
    bias[:, 7] = -math.inf
    q, k = rand(1, 2, 40, 8, seed=1), rand(1, 2, 40, 8, seed=2)
    p, _ = dense_weights(q, k, None, bias)
    assert not p[:, :, 5].any()
    agree(attention_stats(q, k, everything(40), bias=bias, tile=16), by_hand(p, 40, 40, None))


def test_lse_of_a_call_over_more_keys():
    q, k = rand(2, 4, 21, 8, seed=1), rand(2, 2, 37, 8, seed=2)
    p, lse = dense_weights(q, k)
    got = attention_stats(q, k[:, :, :20], ["received"], lse=lse, tile=8)["received"]
    torch.testing.assert_close(got, p[..., :20].sum(2))
    # Its own log-sum-exp changes nothing, also where it is -inf.
    *_, mask, allowed = cases()["empty_rows"]
    q, k = rand(2, 2, 21, 8, seed=1), rand(2, 1, 37, 8, seed=2)
    p, lse = dense_weights(q, k, allowed)
    assert torch.isneginf(lse).any()
    agree(
        attention_stats(q, k, everything(37), mask=mask, lse=lse, tile=8),
        by_hand(p, 21, 37, allowed),
    )


def random_layout(heads, perm=False):
    g = torch.Generator().manual_seed(heads)
    index = torch.full((1, heads, 5, 3), -1)
    for h in range(heads):
        for row in range(5):
            kept = torch.randperm(5, generator=g)[: int(torch.randint(0, 4, (1,), generator=g))]
            index[0, h, row, : kept.numel()] = kept.sort().values
    perms = {}
    if perm:
        perms = {
            x: torch.stack([torch.randperm(37, generator=g) for _ in range(heads)])[None]
            for x in ("perm_q", "perm_k")
        }
    return BlockLayout(37, 37, 8, 8, index, torch.zeros_like(index, dtype=torch.bool), **perms)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("perm", [False, True])
def test_layouts(heads, perm):
    layout = random_layout(heads, perm)
    q, k = rand(2, 4, 37, 8, seed=1), rand(2, 2, 37, 8, seed=2)
    for mask in (None, Causal()):
        allowed = torch.zeros(heads, 37, 37, dtype=torch.bool)
        for h in range(heads):
            rows, cols = torch.arange(37), torch.arange(37)
            if perm:
                rows, cols = layout.perm_q[0, h], layout.perm_k[0, h]
            for row in range(5):
                for key in layout.index[0, h, row].tolist():
                    if key >= 0:
                        r, c = rows[row * 8 : row * 8 + 8], cols[key * 8 : key * 8 + 8]
                        allowed[h, r[:, None], c] = True
        if mask is not None:
            allowed = allowed & torch.ones(37, 37, dtype=torch.bool).tril()
        allowed = allowed.repeat_interleave(4 // heads, 0)
        p, _ = dense_weights(q, k, allowed)
        # Means over visible keys count what the layout and the mask leave.
        got = attention_stats(q, k, everything(37), mask=mask, layout=layout)
        agree(got, by_hand(p, 37, 37, allowed))


def test_keys_that_differ_between_batch_entries():
    q, k = rand(3, 2, 9, 8, seed=1), rand(3, 2, 9, 8, seed=2)
    keys = torch.arange(9) % torch.tensor([[2], [3], [4]]) == 0
    p, _ = dense_weights(q, k)
    got = attention_stats(q, k, [MassOn(keys)])["mass_on"]
    torch.testing.assert_close(got, (p * keys[:, None, None]).sum(-1))


def test_default_edges_hold_all_mass_of_a_causal_call():
    q, k = rand(1, 2, 50, 8, seed=1), rand(1, 2, 50, 8, seed=2)
    got = attention_stats(q, k, ["mass_by_distance"], mask=Causal())["mass_by_distance"]
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 2).double())


def test_objects_start_anew_and_names_can_be_chosen():
    q, k = rand(1, 2, 9, 8, seed=1), rand(1, 2, 9, 8, seed=2)
    stat = Received(name="mine")
    first = attention_stats(q, k, [stat])["mine"].clone()
    again = attention_stats(q, k, [stat, "received"])
    assert torch.equal(first, again["mine"]) and torch.equal(first, again["received"])


def test_a_statistic_of_ones_own():
    class Rows(Statistic):
        def start(self, shape):
            self.shape, self.count = shape, shape.full(shape.n)

        def update(self, tile):
            tile.put(self.count, (tile.p > 0).sum(-1).double())

        def finish(self):
            return {"alive": self.shape.split(self.count)}

    q, k = rand(2, 2, 9, 8, seed=1), rand(2, 2, 9, 8, seed=2)
    got = attention_stats(q, k, [Rows()], mask=Causal(), tile=4)["alive"]
    assert torch.equal(got, torch.arange(1.0, 10.0).double().expand(2, 2, 9))


def test_no_rows_or_no_keys():
    q = rand(1, 2, 0, 8)
    got = attention_stats(q, rand(1, 2, 5, 8), ["received", "entropy"], mask=Causal())
    assert got["entropy"].shape == (1, 2, 0) and not got["received"].any()
    got = attention_stats(rand(1, 2, 3, 8), rand(1, 2, 0, 8), ["received", "entropy"])
    assert got["received"].shape == (1, 2, 0) and not got["entropy"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stats": ["recieved"]}, "'recieved' is no statistic, expected one of received"),
        ({"stats": "received"}, r"expected a list such as \['received'\]"),
        ({"stats": ["received", Received()]}, "two results are called 'received'"),
        ({"k": rand(1, 3, 9, 8)}, "k has 3 heads, which does not divide q's 4"),
        ({"k": rand(1, 2, 9, 6)}, "does not fit"),
        ({"q": rand(4, 9, 8)}, r"q has shape \(4, 9, 8\)"),
        ({"lse": torch.zeros(1, 4, 8)}, r"lse has shape \(1, 4, 8\)"),
        ({"tile": 0}, "tile must be >= 1"),
        ({"layout": random_layout(2)}, "layout is for 37 queries"),
        (
            {
                "layout": Causal()
                .layout(9, 9, 4)
                .__class__.from_index(torch.zeros(1, 3, 3, 1, dtype=torch.int64), 9, 9, 4)
            },
            "layout is for batch 1 and 3",
        ),
        ({"mask": PerHead((Causal(), Causal()))}, "heads=2"),
        ({"bias": rand(8, 9)}, "8 rows"),
        ({"stats": [MassOn([9])]}, "keys must lie in 0..8"),
        ({"stats": [MassOn([[0.5]])]}, "keys must be positions"),
        ({"stats": [MassOn(torch.ones(8, dtype=torch.bool))]}, r"expected \(9,\)"),
        ({"stats": [MassByDistance([3, 1])]}, "edges must ascend"),
        ({"stats": [TopK(0)]}, "k must be >= 1"),
        ({"stats": [SpanMass({"a": [(3, 12)]})]}, "span 'a' is"),
        ({"stats": [Window((0, 3), (5, 2))]}, "cols is"),
    ],
)
def test_bad_input_names_itself(change, message):
    call = {"q": rand(1, 4, 9, 8), "k": rand(1, 2, 9, 8), "stats": ["received"]} | change
    with pytest.raises(ValueError, match=message):
        attention_stats(**call)


def test_bad_window():
    with pytest.raises(ValueError, match="window must be >= 1"):
        WindowedDistance(0)
    with pytest.raises(ValueError, match="width must be >= 1"):
        Pooled(0)
    with pytest.raises(ValueError, match=r"cols must be \(start, stop\)"):
        Pooled(2, cols=(3, 3))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_output_of_the_same_pass(heads, perm, kv_heads):
    if heads not in (1, kv_heads):
        heads = 4
    layout = random_layout(heads, perm)
    q, k, v = rand(2, 4, 37, 5), rand(2, kv_heads, 37, 5, seed=1), rand(2, kv_heads, 37, 3, seed=2)
    # What a layout allows is tested on its own, in test_layout.py.
    p, _ = dense_weights(q, k, layout.dense().repeat_interleave(4 // heads, 1))
    got = attention_stats(q, k, [Output(v), "received"], layout=layout)
    wide = v.repeat_interleave(4 // kv_heads, 1)
    agree(got, {"out": p @ wide, "received": p.sum(2)})
    plain = attention_stats(q, k, [Output(v)], mask=Causal(), tile=7)
    want, _ = dense_weights(q, k, torch.ones(37, 37, dtype=torch.bool).tril())
    agree(plain, {"out": want @ wide})
    with pytest.raises(ValueError, match="a divisor of 4"):
        attention_stats(q, k, [Output(v[:, :, :5])])


def test_pooled_of_more_queries_than_keys():
    """Positions of the first queries are negative; cross-attention has such rows."""
    q, k = torch.randn(1, 2, 11, 8).double(), torch.randn(1, 2, 4, 8).double()
    weights = torch.softmax(q @ k.mT * 8**-0.5, -1)
    found = attention_stats(q, k, [Pooled(1, rows=(-7, 4))], mask=Full())["pooled"]
    torch.testing.assert_close(found, weights)
    part = attention_stats(q, k, [Pooled(2, rows=(-5, 0), cols=(1, 3))], mask=Full())["pooled"]
    rows = torch.stack(
        [weights[:, :, 2:4].mean(2), weights[:, :, 4:6].mean(2), weights[:, :, 6]], 2
    )
    torch.testing.assert_close(part[..., 0], rows[..., 1:3].sum(-1))
    with pytest.raises(ValueError, match=r"cols must start at 0 or later, got \(-1, 3\)"):
        Pooled(1, cols=(-1, 3))
