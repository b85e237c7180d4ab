"""Steering methods on the command line: `regard compare --methods` and `regard steer`."""

from __future__ import annotations

import json

import pytest

from regard.catalog import cards
from regard.cli import _methods
from regard.core.masks import Causal, SlidingWindow
from regard.report.mask_text import _makers
from tests.commands import Captured, run


def test_masks_names_and_steering_methods_in_one_list() -> None:
    text = "full,vhr, Causal() & SlidingWindow(3, 1) ,gift(alpha=3.0, layers=(1, 2)),act(file=h.st)"
    assert _methods(text) == (
        "full",
        "vhr",
        Causal() & SlidingWindow(3, 1),
        "gift(alpha=3.0, layers=(1, 2))",
        "act(file=h.st)",
    )


@pytest.mark.parametrize("name", sorted(_makers()))
def test_no_mask_is_taken_for_a_steering_method(name: str) -> None:
    # An argument that no mask has: what reads masks complains; a steering method would be handed on.
    with pytest.raises(ValueError, match=name):
        _methods(f"{name}(nothing=1)")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gfit(alpha=3.0)", "compare: unknown method 'gfit'; did you mean 'gift'?"),
        ("vrh", "compare: unknown method 'vrh'; did you mean 'vhr'?"),
        ("gift(alhpa=3.0)", "compare: gift has no setting 'alhpa'; it has alpha"),
        ("vhr(alpha=x)", "compare: vhr cannot be made with alpha='x'"),
        ("act(file=/nowhere/h)", "compare: act reads a file, but there is no /nowhere/h"),
        ("carve", "compare: carve is not one patch but regard.steer.carve:look ("),
        ("full,Causl()", "Did you mean Causal?"),
    ],
)
def test_a_mistake_of_compare_is_told_before_the_model_is_loaded(
    capsys: Captured, method: str, words: str
) -> None:
    status, out, err = run(capsys, "compare", "--model", "/nowhere", "--methods", method)
    assert status == 2
    assert out.strip() == "" and err.strip().count("\n") == 0
    assert words in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--method", "deepeyes"],
            "steer: deepeyes is not one patch but regard.steer.deepeyes:look",
        ),
        (["--method", "rhea"], "regard catalog rhea tells more"),
        (["--method", "lofit"], "steer: lofit is made for one loaded model"),
        (["--method", "vrh"], "steer: unknown method 'vrh'; did you mean 'vhr'?"),
        (["--method", "gift", "--set", "setup=14"], "steer: gift cannot be made with setup=14"),
    ],
)
def test_a_mistake_of_steer_is_one_line(capsys: Captured, argv: list[str], words: str) -> None:
    status, out, err = run(capsys, "steer", *argv, "--prompt", "x", "--model", "/nowhere")
    assert status == 2
    assert out == "" and err.count("\n") == 1
    assert words in err


def test_steer_lists_what_is_not_one_patch(capsys: Captured) -> None:
    status, out, _ = run(capsys, "steer", "--methods")
    assert status == 0
    methods, rest = out.split("not one patch:")
    assert "vhr" in methods and "deepeyes" not in methods
    assert "deepeyes" in rest and "regard.steer.carve:look" in rest


def test_steer_lists_all_systems_as_json(capsys: Captured) -> None:
    status, out, _ = run(capsys, "steer", "--methods", "--json")
    assert status == 0
    rows = {row["name"]: row for row in json.loads(out)}
    keys = [key for key, card in cards().items() if card.family == "steer"]
    assert sorted(rows) == sorted(keys)
    assert rows["vhr"]["why_not"] is None and rows["vhr"]["settings"]["alpha"] == "2.0"
    for name, row in rows.items():
        if row["why_not"] is None:
            continue
        status, _, err = run(capsys, "steer", "--method", name, "--prompt", "x", "--set", "file=x")
        assert status == 2 and row["why_not"] in err
    assert rows["carve"]["why_not"].startswith("not one patch but regard.steer.carve:look (")
    assert rows["carve"]["settings"] is None
    assert rows["lofit"]["why_not"].startswith("made for one loaded model")


def test_help_says_which_part_is_which(capsys: Captured) -> None:
    status, out, _ = run(capsys, "compare", "--help")
    words = " ".join(out.split())
    assert status == 0
    assert "gift(alpha=3.0)" in words
    assert "first half of the text is their prompt, the second half the answer" in words
    assert "first three quarters are the image, the rest is the text" in words
