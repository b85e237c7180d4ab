"""Keeping memory: a second tensor of the size of one just freed costs no new pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: what the C library was told stays.
_FAULTS = """
import resource, sys, torch
from regard import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)  # 64 MB: more than glibc would keep by itself, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
first = faults()
told = keep_memory()
faults()
faults()
print(first, faults(), told)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is what can be told")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-c", _FAULTS]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    first, second, told = done.stdout.split()
    assert told == "True"
    # huge pages may make them fewer
    assert int(first) > 8 * 32
    assert int(second) < int(first) / 4  # seldom one of the eight lies elsewhere


def test_elsewhere_it_says_so(monkeypatch):
    from regard import keep_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_memory() is False
