"""Small files of methods: tensors as safetensors, and knobs as JSON in one entry of the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class _Tensors(dict[str, Tensor]):
    """Tensors of a file by name; one that is asked for and missing is told as the file's fault."""

    def __init__(self, tensors: Mapping[str, Tensor], whose: str) -> None:
        super().__init__(tensors)
        self.whose = whose

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"{self.whose} has no tensor {name!r}, only {', '.join(sorted(self))}")


def write(path: str | Path, key: str, tensors: Mapping[str, Tensor], knobs: object) -> None:
    """Write a method's tensors and knobs.

    Args:
        path: the file, which is replaced if it is there.
        key: the header's entry, by which :func:`read` knows the file.
        tensors: by name, in any dtype, on any device; written without their gradients.
        knobs: what JSON can hold; tuples come back as lists.
    """
    from safetensors.torch import save_file

    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(held, str(path), metadata={key: json.dumps(knobs)})


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
