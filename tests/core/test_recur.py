"""recur: against the recurrence written out here, chunk sizes, states, groups, gradients."""

import pytest
import torch

from regard.core.recur import recur
from regard.core.recur_packed import recur_packed

VARIANTS = ["plain", "constant", "token", "channel", "delta", "token-delta", "channel-delta"]


def inputs(variant, n=37, heads=4, kv=2, b=2, width=5, value=3, dtype=torch.float64, strong=1.0):
    generator = torch.Generator().manual_seed(n + 7 * len(variant))

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = draw(b, heads, n, width), draw(b, kv, n, width), draw(b, kv, n, value)
    given = {}
    if "constant" in variant:
        given["decay"] = -draw(kv).abs() * strong
    if "token" in variant:
        given["decay"] = -draw(b, kv, n).abs() * strong
    if "channel" in variant:
        given["decay"] = -draw(b, kv, n, width).abs() * strong
    if "delta" in variant:
        k = torch.nn.functional.normalize(k, dim=-1)
        given["beta"] = draw(b, kv, n).sigmoid()
    given = {name: x.to(dtype) for name, x in given.items()}
    return q.to(dtype), k.to(dtype), v.to(dtype), given


def written_out(q, k, v, decay=None, beta=None, state=None, scale=1.0):
    """The recurrence, one head and one token at a time."""
    b, h, n, width = q.shape
    kv, value = k.shape[1], v.shape[-1]
    out = torch.zeros(b, h, n, value, dtype=torch.float64)
    last = torch.zeros(b, kv, width, value, dtype=torch.float64) if state is None else state.clone()
    for x in range(b):
        for y in range(kv):
            s = last[x, y]
            for t in range(n):
                if decay is not None:
                    g = decay[y] if decay.dim() == 1 else decay[x, y, t]
                    s = torch.exp(g.reshape(-1, 1)) * s
                u = v[x, y, t]
                if beta is not None:
                    u = beta[x, y, t] * (u - s.T @ k[x, y, t])
                s = s + torch.outer(k[x, y, t], u)
                for i in range(h // kv):
                    out[x, y * (h // kv) + i, t] = scale * (s.T @ q[x, y * (h // kv) + i, t])
            last[x, y] = s
    return out, last


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("n", "chunk"), [(1, 64), (3, 64), (37, 1), (37, 7), (37, 16), (37, 64), (40, 8)]
)
def test_chunks_give_the_recurrence(variant, n, chunk):
    q, k, v, given = inputs(variant, n)
    state = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    expected, last = written_out(q, k, v, **given, state=state, scale=0.3)
    for backend in ("chunk", "reference"):
        out, end = recur(
            q,
            k,
            v,
            **given,
            state=state,
            scale=0.3,
            chunk=chunk,
            return_state=True,
            backend=backend,
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(end, last)
    assert torch.equal(recur(q, k, v, **given, chunk=chunk), recur(q, k, v, **given, chunk=chunk))


@pytest.mark.parametrize("variant", VARIANTS)
def test_strips_hand_their_state_over(variant, monkeypatch):
    monkeypatch.setattr("regard.core.recur_chunk._STRIP", 1)
    q, k, v, given = inputs(variant, 50)
    expected, last = written_out(q, k, v, **given)
    out, end = recur(q, k, v, **given, chunk=8, return_state=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_grouped_heads_and_states_of_query_heads(variant, heads, kv):
    q, k, v, given = inputs(variant, 21, heads, kv)
    group = heads // kv
    grouped = recur(q, k, v, **given, chunk=8)
    wide = {x: y.repeat_interleave(group, 0 if y.dim() == 1 else 1) for x, y in given.items()}
    expected = recur(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), **wide, chunk=8
    )
    torch.testing.assert_close(grouped, expected)
    torch.testing.assert_close(recur(q, k, v, **wide, chunk=8), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_call_is_many_calls(variant):
    q, k, v, given = inputs(variant, 33, dtype=torch.float32)
    whole, last = recur(q, k, v, **given, return_state=True)
    for sizes in ([10, 23], [1] * 33, [5, 1, 27]):
        state, parts, at = None, [], 0
        for size in sizes:
            cut = slice(at, at + size)
            now = {x: y if y.dim() == 1 else y[:, :, cut] for x, y in given.items()}
            part, state = recur(
                q[:, :, cut], k[:, :, cut], v[:, :, cut], **now, state=state, return_state=True
            )
            parts.append(part)
            at += size
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(state, last, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_token_moves_nothing_earlier(variant):
    q, k, v, given = inputs(variant, 40, dtype=torch.float32)
    before = recur(q, k, v, **given, chunk=16)
    for x in (q, k, v, *(y for y in given.values() if y.dim() > 1)):
        x[:, :, 25:] *= 0.5
    after = recur(q, k, v, **given, chunk=16)
    assert torch.equal(before[:, :, :25], after[:, :, :25])
    assert not torch.equal(before[:, :, 25:], after[:, :, 25:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant, monkeypatch):
    monkeypatch.setattr("regard.core.recur_chunk._STRIP", 1)
    q, k, v, given = inputs(variant, 11, 2, 1, 1, 3, 2)
    names, state = list(given), torch.randn(1, 1, 3, 2, dtype=torch.float64)

    def run(q, k, v, state, *rest):
        return recur(
            q, k, v, state=state, **dict(zip(names, rest, strict=True)), chunk=4, return_state=True
        )

    values = [x.requires_grad_() for x in (q, k, v, state, *given.values())]
    if "decay" in given:  # away from 0, where the check would step over the edge
        values[4 + names.index("decay")] = (given["decay"].detach() - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("variant", ["constant", "token", "channel", "channel-delta"])
def test_strong_decay_neither_overflows_nor_leaks(variant):
    q, k, v, given = inputs(variant, 130, dtype=torch.float32, strong=80.0)
    out, last = recur(q, k, v, **given, return_state=True)
    double = [x.double() for x in (q, k, v)], {x: y.double() for x, y in given.items()}
    expected, end = written_out(*double[0], **double[1])
    exact = recur(*double[0], **double[1], return_state=True)
    torch.testing.assert_close(exact[0], expected)
    torch.testing.assert_close(exact[1], end)
    # Log-decays of a chunk add up to 5000, of which float32 keeps differences to 3e-4.
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(last.double(), end, atol=1e-3, rtol=1e-3)
    for x in (q, k, v, given["decay"]):
        x.requires_grad_()
    grads = torch.autograd.grad(recur(q, k, v, **given).sum(), (q, k, v, given["decay"]))
    assert all(grad.isfinite().all() for grad in grads)


def test_limits():
    q, k, v, _ = inputs("plain", 20, 2, 2)
    mask = torch.ones(20, 20, dtype=torch.float64).tril()
    torch.testing.assert_close(recur(q, k, v), (q @ k.mT * mask) @ v)
    gone = torch.full((2,), -1e4, dtype=torch.float64)
    torch.testing.assert_close(recur(q, k, v, decay=gone), (q * k).sum(-1, keepdim=True) * v)
    # Orthonormal keys and beta = 1: what was stored comes back exactly, and is overwritten.
    keys = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)
    keys = torch.cat([keys, keys], 2)
    values = torch.randn(2, 2, 10, 3, dtype=torch.float64)
    ones = torch.ones(2, 2, 10, dtype=torch.float64)
    _, state = recur(keys, keys, values, beta=ones, chunk=4, return_state=True)
    torch.testing.assert_close(state, values[:, :, 5:])
    gate = torch.randn(2, 2, 20, 3, dtype=torch.float64)
    torch.testing.assert_close(recur(q, k, v, gate=gate), recur(q, k, v) * gate)


@pytest.mark.parametrize("variant", ["plain", "constant", "token"])
def test_both_ways(variant):
    q, k, v, given = inputs(variant, 19)
    sums = torch.zeros(2, 2, 19, dtype=torch.float64)
    if "decay" in given:
        g = given["decay"]
        sums = (g[None, :, None].expand(2, 2, 19) if g.dim() == 1 else g).cumsum(-1)
    weight = torch.exp(-(sums[..., :, None] - sums[..., None, :]).abs()).repeat_interleave(2, 1)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    expected = (q @ wide[0].mT * weight * 0.5) @ wide[1]
    found = recur(q, k, v, **given, causal=False, scale=0.5, chunk=8)
    torch.testing.assert_close(found, expected)


def test_half_precision_is_computed_in_float32():
    q, k, v, given = inputs("token-delta", 30, dtype=torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    out, state = recur(*half, **given, return_state=True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected = recur(*(x.float() for x in half), **given)
    torch.testing.assert_close(out, expected.bfloat16())


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_are_separate_ones(variant):
    lengths = [5, 0, 17, 5, 1]
    total = sum(lengths)
    q, k, v, given = inputs(variant, total, b=1)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    states = torch.randn(5, 2, 5, 3, dtype=torch.float64)
    packed = {x: y if y.dim() == 1 else y[0].transpose(0, 1) for x, y in given.items()}
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    out, last = recur_packed(*flat, cu, **packed, state=states, chunk=4, return_state=True)
    for i, (a, z) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        now = {x: y if y.dim() == 1 else y[:, :, a:z] for x, y in given.items()}
        expected, end = recur(
            q[:, :, a:z],
            k[:, :, a:z],
            v[:, :, a:z],
            **now,
            state=states[i : i + 1],
            return_state=True,
        )
        torch.testing.assert_close(out[a:z], expected[0].transpose(0, 1))
        torch.testing.assert_close(last[i : i + 1], end)


def test_empty_batch_and_no_tokens():
    q, k, v, given = inputs("token-delta", 0)
    out, state = recur(q, k, v, **given, return_state=True)
    assert out.shape == (2, 4, 0, 3) and not state.any()
    q, k, v, given = inputs("token", 9, b=0)
    assert recur(q, k, v, **given).shape == (0, 4, 9, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, 8, 5)}, r"recur: k must be \(2, a divisor of 4, 8, 5\)"),
        ({"v": torch.zeros(2, 2, 7, 5)}, "recur: v must be"),
        ({"q": torch.zeros(2, 4, 8)}, "recur: q must be floating point"),
        ({"decay": torch.ones(2)}, "log-decays, which are <= 0, got up to 1"),
        ({"decay": torch.zeros(3)}, r"recur: decay must be \(2,\) or \(2, 2, 8\)"),
        ({"beta": torch.zeros(2, 2, 9)}, r"recur: beta must be \(2, 2, 8\)"),
        ({"state": torch.zeros(2, 2, 5, 4)}, r"recur: state must be \(2, 2, 5, 3\)"),
        ({"chunk": 0}, "chunk must be >= 1"),
        ({"backend": "fast"}, "backend must be auto or one of"),
        ({"causal": False, "return_state": True}, "has no delta rule and no state"),
        ({"causal": False, "decay": torch.zeros(2, 2, 8, 5)}, "not one a channel"),
    ],
)
def test_errors(change, message):
    given = {
        "q": torch.zeros(2, 4, 8, 5),
        "k": torch.zeros(2, 2, 8, 5),
        "v": torch.zeros(2, 2, 8, 3),
    }
    given.update(change)
    with pytest.raises(ValueError, match=message):
        recur(**given)
