"""Memory that a process keeps: what PyTorch does on a GPU, asked of the C library on a CPU."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1
# Of the threshold for giving memory back: never.
_NEVER = -1


def keep_memory() -> bool:
    """Have freed memory kept for the next tensor instead of given back to the system.

    glibc maps every large tensor anew and unmaps it when it is freed, and the system clears each page
    of it when it is first touched. On a CPU that is a tenth to a half of the time of attention over
    long sequences. Call it once, early; a process that has used much memory then goes on holding it.
    Tensors above 2 GB are still mapped anew. From outside, for up to 2 GB in all:
    ``MALLOC_MMAP_THRESHOLD_=2147483647 MALLOC_TRIM_THRESHOLD_=2147483647``.

    Returns:
        Whether the C library is one that can be told (glibc on Linux).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    asked = ((_MMAP_THRESHOLD, _MOST), (_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(name, value) == 1 for name, value in asked)
