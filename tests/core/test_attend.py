"""attend() and its backends against attention written out with plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import (
    ALiBi,
    BlockLayout,
    Causal,
    Dense,
    DenseBias,
    Documents,
    Full,
    Keys,
    PerHead,
    RelativeBias1D,
    Sinks,
    SlidingWindow,
    attend,
)
from regard.core.attend import plan

from .dense import dense_attention

STREAMING = Causal() & (SlidingWindow(9) | Sinks(2))


def _qkv(b=2, h=4, hkv=2, n=37, m=37, d=8, dv=6, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, h, n, d), (b, hkv, m, d), (b, hkv, m, dv))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_(grad) for s in shapes]


def _masks(b, h, m):
    g = torch.Generator().manual_seed(m)
    return {
        "none": None,
        "full": Full(),
        "causal": Causal(),
        "streaming": STREAMING,
        "per head": PerHead([SlidingWindow(i + 1, 2) for i in range(h)]),
        "padding": Causal() & Keys(torch.rand(b, m, generator=g) > 0.4),
        "documents": Documents(torch.randint(0, 3, (m,), generator=g).sort().values),
        "nothing": SlidingWindow(0) & ~Causal(),
    }


@settings(max_examples=120, deadline=None)
@given(
    backend=st.sampled_from(["reference", "blocks", "auto"]),
    b=st.sampled_from([1, 2]),
    hkv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    m=st.sampled_from([1, 5, 64, 65, 150]),
    part=st.sampled_from([1.0, 0.5, 0.0]),
    kind=st.sampled_from(
        ["none", "full", "causal", "streaming", "per head", "padding", "documents", "nothing"]
    ),
    seed=st.integers(0, 99),
)
def test_outputs_lse_and_gradients(backend, b, hkv, group, m, part, kind, seed):
    h, n = hkv * group, max(1, int(m * part))
    q, k, v = _qkv(b, h, hkv, n, m, seed=seed, grad=True)
    mask = _masks(b, h, m)[kind]
    allowed = None if mask is None else mask.dense(n, m)
    want, want_lse = dense_attention(q, k, v, allowed)
    out, lse = attend(q, k, v, mask=mask, backend=backend, return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-10)
    g = torch.Generator().manual_seed(seed + 1)
    pull, pull_lse = (
        torch.randn(out.shape, generator=g).double(),
        torch.randn(lse.shape, generator=g).double(),
    )
    seen = torch.isfinite(want_lse)
    grads = torch.autograd.grad((out * pull).sum() + (lse * pull_lse)[seen].sum(), (q, k, v))
    wants = torch.autograd.grad((want * pull).sum() + (want_lse * pull_lse)[seen].sum(), (q, k, v))
    for got, expected in zip(grads, wants, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(
    bl=st.sampled_from([1, 2]),
    heads=st.sampled_from(["one", "key heads", "query heads"]),
    block=st.sampled_from([(4, 4), (16, 8), (5, 7), (64, 64)]),
    permuted=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layouts_on_both_backends(bl, heads, block, permuted, masked, seed):
    b, hkv, h, n, m = 2, 2, 6, 33, 41
    g = torch.Generator().manual_seed(seed)
    hl = {"one": 1, "key heads": hkv, "query heads": h}[heads]
    nq, nk = -(-n // block[0]), -(-m // block[1])
    chosen = torch.rand(bl, hl, nq, nk, generator=g) > 0.5
    allowed = chosen.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :n, :m]
    perms = {}
    if permuted:
        perm_q = torch.argsort(torch.rand(bl, hl, n, generator=g), -1)
        perm_k = torch.argsort(torch.rand(1, hl, m, generator=g), -1)
        perms = {"perm_q": perm_q, "perm_k": perm_k}
        undo_q, undo_k = perm_q.argsort(-1), perm_k.argsort(-1).expand(bl, hl, m)
        allowed = allowed.gather(2, undo_q[..., None].expand(allowed.shape))
        allowed = allowed.gather(3, undo_k[:, :, None].expand(allowed.shape))
    if hl == hkv:
        allowed = allowed.repeat_interleave(h // hkv, 1)
    layout = BlockLayout.from_index(torch.where(chosen, torch.arange(nk), -1), n, m, block, **perms)
    mask = STREAMING if masked else None
    if masked:
        allowed = allowed & STREAMING.dense(n, m)
    q, k, v = _qkv(b, h, hkv, n, m, seed=seed, grad=True)
    want, want_lse = dense_attention(q, k, v, allowed)
    pull = torch.randn(want.shape, generator=g).double()
    wants = torch.autograd.grad((want * pull).sum(), (q, k, v))
    for backend in ("reference", "blocks", "auto"):
        out, lse = attend(q, k, v, mask=mask, layout=layout, backend=backend, return_lse=True)
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-10)
        for got, expected in zip(
            torch.autograd.grad((out * pull).sum(), (q, k, v)), wants, strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocks", "auto"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("mask", [None, Causal(), STREAMING], ids=["none", "causal", "streaming"])
def test_lower_precision(backend, dtype, tolerance, mask):
    q, k, v = _qkv(n=130, m=130, dtype=dtype)
    allowed = None if mask is None else mask.dense(130)
    want, _ = dense_attention(q.double(), k.double(), v.double(), allowed)
    out = attend(q, k, v, mask=mask, backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    if backend in ("reference", "blocks"):
        assert (
            attend(q, k, v, mask=mask, backend=backend, return_lse=True)[1].dtype == torch.float32
        )


@pytest.mark.parametrize("kind", ["none", "causal", "streaming", "padding", "nothing"])
def test_sdpa_backend(kind):
    for n, d, dv in ((37, 8, 6), (1, 9, 12), (12, 8, 8)):
        q, k, v = _qkv(n=n, d=d, dv=dv)
        mask = _masks(2, 4, 37)[kind]
        want, _ = dense_attention(q, k, v, None if mask is None else mask.dense(n, 37))
        torch.testing.assert_close(attend(q, k, v, mask=mask, backend="sdpa"), want)


@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_gradcheck(backend):
    q, k, v = _qkv(1, 2, 1, 6, 7, 3, 2, grad=True)
    mask = Causal() & SlidingWindow(3) & Keys(torch.tensor([False] * 3 + [True] * 4))

    def f(q, k, v):
        out, lse = attend(q, k, v, mask=mask, backend=backend, return_lse=True)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(f, (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocks", "auto"])
@pytest.mark.parametrize("mask", [Causal(), STREAMING], ids=["causal", "streaming"])
def test_a_later_token_moves_no_earlier_output_by_a_bit(backend, mask):
    q, k, v = _qkv(n=300, m=300, dtype=torch.float32)
    before = attend(q, k, v, mask=mask, backend=backend)
    at = 171
    for x in (q, k, v):
        x[:, :, at:] = 1e4
    after = attend(q, k, v, mask=mask, backend=backend)
    assert torch.equal(before[:, :, :at], after[:, :, :at])
    assert not torch.equal(before[:, :, at:], after[:, :, at:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "blocks", "auto"])
@pytest.mark.parametrize(
    ("mask", "n"),
    [
        (Causal() & SlidingWindow(20), 300),  # bands
        (STREAMING, 300),  # slices
        (PerHead([Causal()] * 3 + [STREAMING]), 300),  # gathered
        (STREAMING, 1),  # one row
    ],
    ids=["window", "streaming", "per head", "one row"],
)
def test_a_key_without_number_reaches_no_row_that_may_not_see_it(mask, n, backend, poison, dtype):
    q, k, v = _qkv(b=1, n=n, m=300, dtype=dtype)
    before, lse_before = attend(q, k, v, mask=mask, backend=backend, return_lse=True)
    at = 170 if n > 1 else 295 - 12
    k[:, :, at] = poison
    after, lse = attend(q, k, v, mask=mask, backend=backend, return_lse=True)
    hidden = ~mask.dense(n, 300)[..., at].expand(1, 4, n)
    assert hidden.sum() > 0
    torch.testing.assert_close(after[hidden], before[hidden])
    torch.testing.assert_close(lse[hidden], lse_before[hidden])
    if n > 1:
        assert after[~hidden].isnan().any()


@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_a_bias_without_number_counts_only_where_a_row_may_look(backend):
    q, k, v = _qkv(n=130, m=130, dtype=torch.float32)
    i = torch.arange(130)
    # as the logarithm of a distance has it: NaN for all later keys
    bias = -torch.log1p((i[:, None] - i[None, :]).float() - 0.5)
    assert bias.isnan().any()
    out = attend(q, k, v, mask=Causal(), bias=bias, backend=backend)
    expected = attend(q, k, v, mask=Causal(), bias=bias.nan_to_num(), backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["reference", "blocks", "auto"])
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_nothing_to_compute(backend, shape):
    b, n, m = shape
    if backend == "blocks" and 0 in (n, m):
        with pytest.raises(ValueError, match="at least one query and one key"):
            attend(*_qkv(b, n=n, m=m), backend=backend)
        return
    out, lse = attend(*_qkv(b, n=n, m=m), mask=Causal(), backend=backend, return_lse=True)
    assert out.shape == (b, 4, n, 6) and not out.any()
    assert lse.shape == (b, 4, n) and bool((lse == float("-inf")).all())


BIASES = {
    "dense": lambda: DenseBias(torch.randn(4, 37, 37, dtype=torch.float64, requires_grad=True)),
    "batched": lambda: DenseBias(
        torch.randn(2, 1, 37, 37, dtype=torch.float64, requires_grad=True)
    ),
    "table": lambda: RelativeBias1D(torch.randn(4, 73, dtype=torch.float64, requires_grad=True)),
    "alibi": lambda: ALiBi.for_heads(4),
}


@pytest.mark.parametrize("backend", ["reference", "blocks", "auto"])
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("mask", ["none", "streaming", "per head", "padding"])
def test_biases_and_their_gradients(backend, kind, mask):
    torch.manual_seed(1)
    bias, where = BIASES[kind](), _masks(2, 4, 37)[mask]
    q, k, v = _qkv(n=21, grad=True)
    i, j = torch.arange(16, 37)[:, None], torch.arange(37)[None]
    h, b = torch.arange(4).view(1, -1, 1, 1), torch.arange(2).view(-1, 1, 1, 1)
    added = bias.scores(i, j, h, b).double()
    want, want_lse = dense_attention(q, k, v, None if where is None else where.dense(21, 37), added)
    out, lse = attend(q, k, v, mask=where, bias=bias, backend=backend, return_lse=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if kind == "alibi" else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(out, want, **tolerance)
    torch.testing.assert_close(lse, want_lse, **tolerance)
    inputs = (q, k, v, *(x for x in bias.tensors() if x.requires_grad))
    wants = torch.autograd.grad((want * want).sum(), inputs)
    for got, expected in zip(torch.autograd.grad((out * out).sum(), inputs), wants, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


def test_a_bias_of_minus_infinity_is_a_mask():
    q, k, v = _qkv()
    shut = torch.zeros(37, 37).masked_fill(~STREAMING.dense(37), float("-inf")).double()
    shut[5] = float("-inf")
    for backend in ("reference", "blocks"):
        out, lse = attend(q, k, v, bias=shut, backend=backend, return_lse=True)
        want = STREAMING.dense(37)
        want[5] = False
        torch.testing.assert_close(out, dense_attention(q, k, v, want)[0])
        assert bool((lse[:, :, 5] == float("-inf")).all())


@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_dropout(backend):
    q, k, v = _qkv(1, 2, 2, 200, 200, grad=True)
    ones = torch.ones_like(v)

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return attend(q, k, ones, mask=Causal(), dropout=0.3, generator=g, backend=backend)

    first = draw(0)
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    # Every kept weight is scaled by 1 / (1 - p), so that rows sum to 1 in the mean.
    assert first[:, :, 50:].mean().item() == pytest.approx(1.0, abs=0.02)

    def f(q):
        g = torch.Generator().manual_seed(3)
        return attend(q, k[:, :, :6], v[:, :, :6], dropout=0.5, generator=g, backend=backend)

    assert torch.autograd.gradcheck(f, (q[:, :, :5].detach().requires_grad_(),))


def test_scale_is_free():
    q, k, v = _qkv()
    want, _ = dense_attention(q, k, v, Causal().dense(37), scale=0.3)
    for backend in ("reference", "sdpa", "blocks"):
        torch.testing.assert_close(attend(q, k, v, mask=Causal(), scale=0.3, backend=backend), want)


def test_auto_picks_what_the_call_needs():
    q, k, v = _qkv(n=300, m=300, dtype=torch.float32)
    assert plan(q, k, v, mask=Causal()).backend == "sdpa"
    assert plan(q, k, v).backend == "sdpa"
    assert plan(q[:, :, :1], k, v, mask=Causal()).backend == "sdpa"
    sparse = plan(q, k, v, mask=STREAMING)
    assert sparse.backend == "blocks" and 0 < sparse.density < 1
    assert plan(q, k, v, mask=Causal(), return_lse=True).backend == "blocks"
    assert plan(q, k, v, mask=Causal(), bias=ALiBi.for_heads(4)).backend == "sdpa"
    assert "fused kernel" in plan(q, k, v).reason


def test_layouts_of_constant_masks_are_cached_others_are_not():
    q, k, v = _qkv(n=300, m=300)
    first, second = (plan(q, k, v, mask=Causal() & SlidingWindow(7)).call.layout for _ in range(2))
    assert first is second
    valid = torch.ones(2, 300, dtype=torch.bool)
    before = attend(q, k, v, mask=Keys(valid))
    changed = valid.clone()
    changed[:, 100:] = False
    assert not torch.allclose(before, attend(q, k, v, mask=Keys(changed)))


def _bad(**change):
    q, k, v = _qkv()
    arguments = {"q": q, "k": k, "v": v, **change}
    return lambda: attend(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.randn(2, 3, 37, 8).double()}, "v has 2 heads and 37 keys, but k has 3 and 37"),
        ({"q": torch.randn(2, 3, 37, 8).double()}, "k has 2 heads, which does not divide q's 3"),
        ({"q": torch.randn(4, 37, 8)}, "q must be .batch, heads, length, width., got .4, 37, 8."),
        ({"q": [1]}, "q must be a tensor, got list"),
        ({"q": torch.ones(2, 4, 37, 8, dtype=torch.int64)}, "q must be floating point"),
        ({"k": torch.randn(2, 2, 37, 8)}, "k is torch.float32, but q is torch.float64"),
        ({"k": torch.randn(2, 2, 37, 7).double()}, "k has width 7, but q has 8"),
        ({"k": torch.randn(1, 2, 37, 8).double()}, "k has batch 1, but q has 2"),
        ({"k": torch.randn(2, 2, 37, 8, device="meta").double()}, "k is on meta"),
        ({"mask": torch.ones(37, 37, dtype=torch.bool)}, r"wrap a bool tensor as Dense"),
        ({"mask": Dense(torch.ones(5, 5, dtype=torch.bool))}, "the tensor is 5 x 5"),
        ({"mask": PerHead([Causal()] * 3)}, "made for heads=3, but the call has 4"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"backend": "magic"}, "unknown backend 'magic'"),
        ({"backend": "sdpa", "return_lse": True}, "does not return the log-sum-exp"),
        ({"backend": "sdpa", "bias": torch.zeros(37, 37)}, "biases are served by"),
        ({"bias": torch.ones(37, 37, dtype=torch.bool)}, "bool"),
        ({"layout": Causal().layout(36)}, "the layout is for 36 queries and 36 keys"),
        ({"layout": BlockLayout.from_index(torch.zeros(1, 3, 1, 1), 37, 37, 64)}, "3 heads"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        _bad(**change)()


def test_more_reasons_not_to_serve():
    q, k, v = _qkv(n=300, m=300)
    layout = Causal().layout(300, 300, 64)
    g = torch.Generator()
    for backend, words, change in (
        ("sdpa", "ignores layouts", {"layout": layout}),
        ("sdpa", "no generator", {"dropout": 0.1, "generator": g}),
        ("flex", "float64", {}),
        ("flex", "no dropout", {"dropout": 0.1}),
    ):
        with pytest.raises(ValueError, match=words):
            attend(q, k, v, backend=backend, **change)
    half = [x.float().requires_grad_() for x in (q, k, v)]
    with pytest.raises(ValueError, match="multiples of 128"):
        attend(*half, layout=layout, backend="flex")
    turned = BlockLayout.from_index(
        torch.zeros(1, 1, 3, 1), 300, 300, 128, perm_q=torch.arange(300).flip(0).view(1, 1, 300)
    )
    with pytest.raises(ValueError, match="cannot permute"):
        attend(*half, layout=turned, backend="flex")
    with pytest.raises(ValueError, match="no backward"):
        attend(*half, backend="flex")
    with pytest.raises(ValueError, match="log-sum-exp"):
        attend(*half, backend="flex", return_lse=True)
    with pytest.raises(ValueError, match="no keys"):
        attend(q, k[:, :, :0], v[:, :, :0], backend="sdpa")
