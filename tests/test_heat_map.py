"""Heat maps of tables: the pixels of the cells, the order of the labels, mistakes."""

from __future__ import annotations

import matplotlib.image
import pytest
import torch

from regard.models import Table
from regard.report.heat_map import heat_map


def pixels(png, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png)
    return torch.tensor(matplotlib.image.imread(path))[..., :3]


def share(image, colour, tolerance=0.02):
    """Share of the pixels of one colour."""
    wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float(((image - wanted).abs().amax(-1) < tolerance).float().mean())


def test_cells_have_the_colour_of_their_value(tmp_path):
    path = tmp_path / "map.png"
    half = Table.of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), ("layer", "head"), "score")
    png = heat_map(half, "score", path=path)
    assert path.read_bytes() == png
    image = pixels(png, tmp_path)
    dark, light = share(image, "#2563a8"), share(image, "#eef2f7")
    assert dark == pytest.approx(light, rel=0.1) and dark > 0.1
    more = Table.of(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), ("layer", "head"), "score")
    image = pixels(heat_map(more, "score"), tmp_path)
    assert share(image, "#2563a8") == pytest.approx(3 * share(image, "#eef2f7"), rel=0.1)


def test_both_signs_lie_around_zero(tmp_path):
    table = Table.of(torch.tensor([[-0.5, 0.0], [1.0, float("nan")]]), ("token", "layer"), "effect")
    image = pixels(heat_map(table, "effect", rows="token", columns="layer"), tmp_path)
    assert share(image, "#2563a8") > 0.05 and share(image, "#eef2f7") > 0.05
    assert share(image, "#b3422f") < 0.01  # -0.5 is half as far from 0 as 1


def test_order_texts_and_missing_pairs(tmp_path):
    rows = ((2, "the", 1.0), (0, "$\\frac{", 2.0), (2, "$\\frac{", 3.0))
    table = Table(("layer", "token", "value"), rows)
    assert heat_map(table, "value", columns="token", title="<b>").startswith(b"\x89PNG")
    long = Table.of(torch.rand(90, 3), ("layer", "head"), "value")
    assert heat_map(long, "value") == heat_map(long, "value")


def test_mistakes():
    table = Table.of(torch.rand(2, 2, 2), ("pass", "layer", "head"), "score")
    with pytest.raises(ValueError, match=r"layer 0 and head 0 come twice; choose rows .* where"):
        heat_map(table, "score")
    with pytest.raises(ValueError, match="no column 'entropy'; there are pass, layer, head, score"):
        heat_map(table, "entropy")
    with pytest.raises(ValueError, match="the table has no rows"):
        heat_map(table.where(layer=7), "score")
    words = Table(("layer", "head", "kind"), ((0, 0, "sink"),))
    with pytest.raises(ValueError, match="kind holds 'sink', expected numbers"):
        heat_map(words, "kind")
