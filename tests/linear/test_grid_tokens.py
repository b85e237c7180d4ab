"""The shape of an image's tokens."""

from __future__ import annotations

import pytest
import torch

from regard.linear.grid_tokens import check_grid_tokens


def test_takes_the_grid_behind_its_class_tokens():
    check_grid_tokens("Layer", torch.zeros(2, 12, 5), (3, 4), 5)
    check_grid_tokens("Layer", torch.zeros(0, 14, 5), (3, 4), 5, num_prefix=2)


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 14, 4), (14, 5), (2, 1, 14, 5)])
def test_other_shapes_are_named(shape):
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"Layer: x must be \(batch, 14, 5\), got {got}"):
        check_grid_tokens("Layer", torch.zeros(shape), (3, 4), 5, num_prefix=2)
