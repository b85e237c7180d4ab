"""Seconds and bytes: medians of warm calls, peak memory of a stretch of code."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done what was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    fn: Callable[[], Any], repeats: int = 5, warmup: int = 1, device: torch.device | str = "cpu"
) -> float:
    """Median wall-clock seconds of ``fn()`` after ``warmup`` calls."""
    for _ in range(warmup):
        fn()
    taken = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        fn()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def paired(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int = 5,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Median seconds of two functions called in turn, so that both see the same machine."""
    taken: tuple[list[float], list[float]] = ([], [])
    ours(), theirs()
    for _ in range(repeats):
        for fn, times in zip((ours, theirs), taken, strict=True):
            times.append(seconds(fn, repeats=1, warmup=0, device=device))
    return statistics.median(taken[0]), statistics.median(taken[1])


def row(
    name: str,
    ours: float,
    theirs: float | None = None,
    bound: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    """A benchmark's row: seconds, ``ratio`` = theirs over ours, and the ratio that ``bound``s it."""
    ratio = None if theirs is None else theirs / ours
    return {
        "name": name,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "bound": bound,
        "note": note,
    }


class PeakMemory:
    """Peak memory of a ``with`` block, in bytes: of the process on CPU, of the allocator on CUDA.

    Attributes:
        peak: highest use seen in the block, ``None`` where the system does not tell.
        above: the same above the use at its beginning.
    """

    def __init__(self, device: torch.device | str = "cpu", interval: float = 0.005) -> None:
        self.device, self.interval = torch.device(device), interval
        self.peak: int | None = None
        self.above: int | None = None

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start: int | None = torch.cuda.memory_allocated(self.device)
            return self
        self._start = self.peak = resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._look()

    def _look(self) -> None:
        now = resident()
        if now is not None and self.peak is not None:
            self.peak = max(self.peak, now)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._thread.join()
            self._look()
        if self.peak is not None and self._start is not None:
            self.above = self.peak - self._start


def resident() -> int | None:
    """Resident bytes of this process; ``None`` where there is no ``/proc``."""
    table = Path("/proc/self/statm")
    if not table.exists():
        return None
    return int(table.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, Any]:
    """What figures are measured on, in words that a result can carry."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
