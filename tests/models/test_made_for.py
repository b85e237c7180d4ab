"""What a calibration says of its model, and models of another shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import regard
from regard.models import MadeFor
from regard.sparse.hylra import LayerReuse
from regard.sparse.hylra_plan import ReusePlan
from regard.sparse.moa import MoA
from regard.sparse.moa_plan import MoAPlan
from regard.steer.act import ACT
from regard.steer.var import VAR
from regard.steer.vhr import VHR
from regard.steer.vista import NormPreservingSteer
from tests.models.tiny import ids, make

LLAMA = MadeFor("stories", 4, 4, 2, 8)
# Methods that fit the tiny llama, by the class whose file they have.
METHODS: dict[type, Any] = {
    ACT: ACT(heads=[(1, 0), (2, 3)]),
    VAR: VAR((5,)),
    VHR: VHR(heads=torch.eye(4, dtype=torch.bool)),
    NormPreservingSteer: NormPreservingSteer(torch.ones(4, 32)),
    MoAPlan: MoAPlan([[4.0, 8.0]] * 4, [[0.1, 0.2]] * 4),
    ReusePlan: ReusePlan((-1, 0, -1, 2), (), (1.0, 4.0), 0.5, 0.5),
}


def patched(found: Any) -> Any:
    """What goes into a patch."""
    if isinstance(found, MoAPlan):
        return MoA(found)
    if isinstance(found, ReusePlan):
        return LayerReuse(found.policy, found.full, made_for=found.made_for)
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # from the model cards: layers, heads, key heads and widths
        (hf.LlamaConfig(), ("llama", 32, 32, 32, 128)),
        (hf.GPT2Config(), ("gpt2", 12, 12, 12, 64)),
        (
            hf.Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8),
            ("qwen3", 32, 16, 8, 128),
        ),
        (hf.LlavaConfig(text_config=hf.LlamaConfig()), ("llama", 32, 32, 32, 128)),
    ],
)
def test_is_what_the_configuration_says(config: Any, expected: tuple[Any, ...]) -> None:
    class Model(torch.nn.Module):
        pass

    model = Model()
    model.config = config  # type: ignore[assignment]
    assert MadeFor.of(model) == MadeFor(*expected)


def test_a_model_and_its_decoder_are_the_same() -> None:
    model = make("gemma3")
    assert MadeFor.of(model) == MadeFor.of(model.get_decoder())


def test_names_are_kept_and_places_are_not(tmp_path: Path) -> None:
    model = make("llama")
    assert MadeFor.of(model, "org/model-7b").name == "org/model-7b"
    (tmp_path / "mine").mkdir()
    assert MadeFor.of(model, str(tmp_path / "mine")).name == "mine"


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_every_file_keeps_it(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace(METHODS[kind], made_for=LLAMA).save(path)
    found = kind.load(path)
    assert found.made_for == LLAMA
    with regard.patch(make("llama"), patched(found)):
        pass
    other = make("llama", num_hidden_layers=5)
    words = (
        rf"{type(patched(found)).__name__} was calibrated for stories \(4 layers, .* has 5 layers"
    )
    with pytest.raises(ValueError, match=words), regard.patch(other, patched(found)):
        raise AssertionError("entered")


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_a_file_that_says_nothing_fits_any_model(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    METHODS[kind].save(path)
    assert b"made_for" not in path.read_bytes()
    found = kind.load(path)
    assert found.made_for is None
    with regard.patch(make("llama", num_hidden_layers=5), patched(found)):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2, "head_dim": 8},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
    ],
    ids=["layers", "heads", "key heads", "width"],
)
def test_each_part_of_the_shape_counts(changes: dict[str, int]) -> None:
    model, method = make("llama", **changes), ACT(heads=[(1, 0)], made_for=LLAMA)
    before = model(ids(1, 9)).logits
    words = "ACT was calibrated for stories"
    with pytest.raises(ValueError, match=words), regard.patch(model, method):
        raise AssertionError("entered")
    assert torch.equal(model(ids(1, 9)).logits, before)
    with regard.patch(model, replace(method, made_for=None)):
        assert not torch.equal(model(ids(1, 9)).logits, before)


def test_a_plan_keeps_it_when_heads_are_grouped() -> None:
    plan = MoAPlan([[4.0, 8.0]], [[0.1, 0.2]], made_for=LLAMA)
    assert plan.grouped(1, 64).made_for == LLAMA


@pytest.mark.parametrize(
    "record", [[], {}, {"name": "x"}, {**LLAMA.record(), "layers": "4"}, {**LLAMA.record(), "x": 1}]
)
def test_a_wrong_record_is_named(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    METHODS[MoAPlan].save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_for": record}))
    with pytest.raises(
        ValueError, match=r"MoAPlan\.load: .*plan\.json: made_for must have name, la"
    ):
        MoAPlan.load(path)


@pytest.mark.parametrize("words", ["[]", "{}", '{"alphas": [], "policy": []}', "no JSON"])
@pytest.mark.parametrize("kind", [MoAPlan, ReusePlan])
def test_another_file_is_no_plan(kind: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(words)
    with pytest.raises(ValueError, match=r"plan\.json is no plan|Expecting value"):
        kind.load(path)
