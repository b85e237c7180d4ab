"""Small files of methods: tensors as safetensors, and knobs as JSON in one entry of the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .made_for import MadeFor


class _Tensors(dict[str, Tensor]):
    """Tensors of a file by name; one that is asked for and missing is told as the file's fault."""

    def __init__(self, tensors: Mapping[str, Tensor], whose: str) -> None:
        super().__init__(tensors)
        self.whose = whose

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"{self.whose} has no tensor {name!r}, only {', '.join(sorted(self))}")


# The header's entry for the model.
_MODEL = "made_for"


def write(
    path: str | Path,
    key: str,
    tensors: Mapping[str, Tensor],
    knobs: object,
    made_for: MadeFor | None = None,
) -> None:
    """Write a method's tensors and knobs.

    Args:
        path: the file, which is replaced if it is there.
        key: the header's entry, by which :func:`read` knows the file.
        tensors: by name, in any dtype, on any device; written without their gradients.
        knobs: what JSON can hold; tuples come back as lists.
        made_for: the model that they belong to, if it is known.
    """
    from safetensors.torch import save_file

    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    header = {key: json.dumps(knobs)}
    if made_for is not None:
        header[_MODEL] = json.dumps(made_for.record())
    save_file(held, str(path), metadata=header)


def read(path: str | Path, key: str, owner: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the knobs of a file of :func:`write`.

    Args:
        path: the file.
        key: as it was written.
        owner: the class that reads, whose ``load`` the messages name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another file; or, when it is looked up in the dict, a tensor is missing.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = (file.metadata() or {}).get(key)
        if header is None:
            raise ValueError(f"{owner}.load: {path} was not written by {owner}.save")
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    return _Tensors(tensors, f"{owner}.load: {path}"), json.loads(header)


def model_of(path: str | Path, owner: str) -> MadeFor | None:
    """The model that a file of :func:`write` belongs to; ``None`` where it does not say.

    Args:
        path, owner: as for :func:`read`.

    Raises:
        ValueError: the entry cannot be read.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = (file.metadata() or {}).get(_MODEL)
    return MadeFor.read(None if header is None else json.loads(header), f"{owner}.load: {path}")
