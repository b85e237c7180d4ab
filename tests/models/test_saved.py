"""What methods write to a file, against safetensors' own reader and writer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regard.models import saved


def test_file_is_tensors_and_one_json_entry(tmp_path):
    path = tmp_path / "a.safetensors"
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    saved.write(path, "key", {"w": weight.T}, {"p": 0.5, "rows": "all", "heads": [(0, 1)]})
    with safe_open(str(path), framework="pt") as file:
        assert list(file.keys()) == ["w"]
        assert torch.equal(file.get_tensor("w"), weight.detach().T)
        header = file.metadata()
    assert list(header) == ["key"]
    assert json.loads(header["key"]) == {"p": 0.5, "rows": "all", "heads": [[0, 1]]}


def test_reads_what_was_written(tmp_path):
    path = str(tmp_path / "a.safetensors")
    given = {"a": torch.tensor([[1, 2]]), "b": torch.zeros(0, 2, dtype=torch.bool)}
    saved.write(path, "key", given, {"p": None})
    tensors, knobs = saved.read(path, "key", "Some")
    assert knobs == {"p": None} and tensors.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_another_file_and_a_missing_tensor_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"other": "{}"}):
        save_file({"a": torch.ones(1)}, str(path), metadata=metadata)
        with pytest.raises(
            ValueError, match=r"Some\.load: .*a\.safetensors was not written by Some"
        ):
            saved.read(path, "key", "Some")
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, str(path), metadata={"key": "{}"})
    tensors, _ = saved.read(path, "key", "Some")
    with pytest.raises(
        ValueError, match=r"Some\.load: .*a\.safetensors has no tensor 'b', only a, c"
    ):
        tensors["b"]
    with pytest.raises(FileNotFoundError):
        saved.read(tmp_path / "none", "key", "Some")
