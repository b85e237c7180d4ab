"""States of the blocks of a layout, against the dense mask."""

from __future__ import annotations

import torch

from regard.core.layout import build_layout


def is_tight(mask, n, m, block):
    """Whether the mask's ``tile`` lists exactly the blocks with an allowed pair and marks as partial
    exactly those with a forbidden one."""
    bq, bk = block
    layout = build_layout(mask, n, m, block)
    dense = mask.dense(n, m).view(mask.heads or 1, n, m)
    for h, head in enumerate(dense):
        for row in range(layout.query_blocks):
            listed = dict(
                zip(
                    layout.index[0, h, row].tolist(),
                    layout.partial[0, h, row].tolist(),
                    strict=True,
                )
            )
            for column in range(layout.key_blocks):
                part = head[row * bq : (row + 1) * bq, column * bk : (column + 1) * bk]
                if bool(part.any()) != (column in listed):
                    return False
                if column in listed and listed[column] == bool(part.all()):
                    return False
    return True


def same_blocks(a, b):
    return torch.equal(a.index, b.index) and torch.equal(a.partial, b.partial)
