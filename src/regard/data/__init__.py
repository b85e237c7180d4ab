"""Data files of the package: the list of systems, and the sample text of `regard compare`."""

from __future__ import annotations

from importlib.resources import files


def read(name: str) -> str:
    """The text of one data file, for example ``"systems.tsv"``."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def sample_text() -> str:
    """Milton's Paradise Lost, about 457,000 characters; ``sample.md`` says where it comes from."""
    return read("sample.txt")
