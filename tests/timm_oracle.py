"""timm without torchvision, of which there is no CPU build: its parts are stood in for by empty classes.

Only models that use nothing of torchvision when they run may be asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Empty(ModuleType):
    """A module that has every name: each is an empty class."""

    __path__: Sequence[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__init__": lambda self, *_, **__: None})
        setattr(self, name, value)
        return value


class _Torchvision(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Empty(spec.name)
        module.__dict__["__version__"] = "0.99.0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        return None


@contextmanager
def timm_module(name: str) -> Iterator[ModuleType]:
    """A module of timm, such as ``timm.models.mambaout``; everything is unloaded afterwards."""

    def ours() -> list[str]:
        return [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]

    found = find_spec("timm")
    assert found is not None, "timm is missing: pip install --no-deps timm, as the Makefile does"
    root = found.submodule_search_locations[0]
    before = {n: sys.modules.pop(n) for n in ours()}
    finder = _Torchvision()
    sys.meta_path.insert(0, finder)
    # Without their own start, which imports every model and every image transform.
    for package in ("timm", "timm.models", "timm.data"):
        bare = ModuleType(package)
        bare.__path__ = ["/".join([root, *package.split(".")[1:]])]
        bare.__version__ = "0"
        sys.modules[package] = bare
    try:
        constants = import_module("timm.data.constants")
        sys.modules["timm.data"].__dict__.update(vars(constants))
        yield import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for n in ours():
            del sys.modules[n]
        sys.modules.update(before)
