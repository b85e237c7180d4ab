"""Radial attention in two parts: a partition of the whole, with bounds that hold."""

import pytest
import torch

from regard import attend
from regard.patterns.radial import radial_mask
from regard.patterns.radial_parts import RadialPart, radial_attention


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("frames", "s", "split"), [(12, 5, 3), (9, 8, 4), (20, 3, 8), (40, 1, 8)])
def test_parts_are_a_partition(frames, s, split, sink):
    whole = radial_mask(frames, s, sink=sink)
    near = RadialPart(frames, s, sink, 0, 0, split - 1)
    far = RadialPart(frames, s, sink, 0, split, frames - 1)
    n = frames * s
    a, b = near.dense(n), far.dense(n)
    assert not (a & b).any() and torch.equal(a | b, whole.dense(n))
    assert b.any()
    for part, dense in ((near, a), (far, b)):
        assert part.pairs() == int(dense.sum())
        for block in ((4, 4), (8, 6)):
            layout = part.layout(n, n, block)
            assert torch.equal(layout.dense()[0, 0], dense)


@pytest.mark.parametrize("sink", [True, False])
def test_bounds_of_rectangles_hold(sink):
    frames, s = 11, 6
    part = RadialPart(frames, s, sink, 0, 3, frames - 1)
    n = frames * s
    dense = part.dense(n)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        i, j = (torch.randint(0, n, (2,), generator=generator).sort().values for _ in range(2))
        found = dense[i[0] : i[1] + 1, j[0] : j[1] + 1]
        some, every = part.tile(i[0], i[1], j[0], j[1])
        assert some or not found.any()
        assert found.all() or not every


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("sink", [True, False])
def test_is_attention_under_the_mask(sink, text):
    mask = radial_mask(34, 4, sink=sink, text=text)
    n = 34 * 4 + text
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    found, expected = (
        radial_attention(q, k, v, mask),
        attend(q, k, v, mask=mask, backend="reference"),
    )
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), pull),
        torch.autograd.grad(expected, (q, k, v), pull),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_many_frames_list_fewer_pairs():
    frames = s = 128
    n = frames * s

    def listed(mask):
        return mask.layout(n, n, (64, 64)).listed_pairs()

    near = RadialPart(frames, s, True, 0, 0, 7)
    far = RadialPart(frames, s, True, 0, 8, frames - 1)
    assert listed(near) + listed(far) < 0.8 * listed(radial_mask(frames, s))


def test_errors():
    mask = radial_mask(34, 4)
    q = torch.zeros(1, 1, 136, 8)
    with pytest.raises(ValueError, match="expected the whole sequence of 136"):
        radial_attention(q[:, :, :10], q, q, mask)
    with pytest.raises(ValueError, match="mask must be from radial_mask"):
        radial_attention(q, q, q, RadialPart(34, 4))
