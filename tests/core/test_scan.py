"""diagonal_scan and selective_scan: against loops written out here."""

import pytest
import torch

from regard.core.scan import diagonal_scan, selective_scan


@pytest.mark.parametrize("length", [0, 1, 2, 3, 9, 10, 37, 100])
@pytest.mark.parametrize("tail", [(), (3,), (2, 3)])
def test_scan_is_the_loop(length, tail):
    torch.manual_seed(length)
    x = torch.randn(2, length, *tail, dtype=torch.float64)
    decay = -torch.rand(2, length, *tail, dtype=torch.float64) * 3
    h = start = torch.randn(2, *tail, dtype=torch.float64)
    expected = []
    for t in range(length):
        h = decay[:, t].exp() * h + x[:, t]
        expected.append(h)
    out, last = diagonal_scan(x, decay, start, return_state=True)
    if length:
        torch.testing.assert_close(out, torch.stack(expected, 1))
    assert out.shape == x.shape
    torch.testing.assert_close(last, h)


def test_one_call_is_many_and_decay_broadcasts():
    torch.manual_seed(0)
    x, decay = torch.randn(1, 50, 4), -torch.rand(4)
    whole = diagonal_scan(x, decay)
    state, parts = None, []
    for piece in x.split([20, 1, 29], dim=1):
        part, state = diagonal_scan(piece, decay, state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_scan_gradients():
    torch.manual_seed(0)
    for length in (1, 7):
        x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
        decay = (-torch.rand(2, length, 3, dtype=torch.float64)).requires_grad_()
        start = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(diagonal_scan, (x, decay, start))


def selective(u, delta, a, b, c, d, bias):
    """Mamba's recurrence, channel by channel."""
    delta = torch.nn.functional.softplus(delta + bias[:, None])
    share = u.shape[1] // b.shape[1]
    y = torch.zeros_like(u)
    for n in range(u.shape[0]):
        for ch in range(u.shape[1]):
            h = torch.zeros(a.shape[1], dtype=u.dtype)
            for t in range(u.shape[2]):
                step = delta[n, ch, t]
                h = torch.exp(step * a[ch]) * h + step * b[n, ch // share, :, t] * u[n, ch, t]
                y[n, ch, t] = c[n, ch // share, :, t] @ h + d[ch] * u[n, ch, t]
    return y


def test_selective_scan_is_mambas_recurrence(monkeypatch):
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    u, delta = torch.randn(2, 4, 13, **double), torch.randn(2, 4, 13, **double)
    a, d, bias = -torch.rand(4, 3, **double), torch.randn(4, **double), torch.randn(4, **double)
    b, c = torch.randn(2, 2, 3, 13, **double), torch.randn(2, 2, 3, 13, **double)
    expected = selective(u, delta, a, b, c, d, bias)
    torch.testing.assert_close(selective_scan(u, delta, a, b, c, d, delta_bias=bias), expected)
    monkeypatch.setattr("regard.core.scan._STRIP", 100)
    found, state = selective_scan(u, delta, a, b, c, d, delta_bias=bias, return_state=True)
    torch.testing.assert_close(found, expected)
    half = [x[..., :6] for x in (u, delta)], [x[..., :6] for x in (b, c)]
    _, middle = selective_scan(*half[0], a, *half[1], d, delta_bias=bias, return_state=True)
    rest = [x[..., 6:] for x in (u, delta)], [x[..., 6:] for x in (b, c)]
    late, end = selective_scan(
        *rest[0], a, *rest[1], d, delta_bias=bias, state=middle, return_state=True
    )
    torch.testing.assert_close(late, expected[..., 6:])
    torch.testing.assert_close(end, state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagonal_scan(torch.zeros(3), torch.zeros(3)), "x must be"),
        (lambda: diagonal_scan(torch.zeros(1, 3, 2), torch.zeros(5)), "does not broadcast"),
        (
            lambda: diagonal_scan(torch.zeros(1, 3, 2), torch.zeros(2), torch.zeros(2)),
            r"initial must be \(1, 2\)",
        ),
        (
            lambda: selective_scan(
                torch.zeros(1, 3, 4),
                torch.zeros(1, 3, 4),
                torch.zeros(3, 2),
                torch.zeros(1, 2, 2, 4),
                torch.zeros(1, 2, 2, 4),
            ),
            "which do not divide 3",
        ),
        (
            lambda: selective_scan(
                torch.zeros(1, 3, 4),
                torch.zeros(1, 3, 5),
                torch.zeros(3, 2),
                torch.zeros(1, 1, 2, 4),
                torch.zeros(1, 1, 2, 4),
            ),
            "delta must be",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
