"""Progress for a log file or a pipe: plain lines on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

# Seconds between two lines; what ends sooner says nothing.
PAUSE = 10.0


@contextmanager
def step_lines(words: str, pause: float | None = None) -> Iterator[Callable[[str], None]]:
    """Print what is being done, a line each ``pause`` seconds at most and one a step at most.

    A clock of its own tells the step that is running, so that a long one is told while it runs.

    Args:
        words: the first step.
        pause: seconds, default :data:`PAUSE`.

    Yields:
        ``say(words)``: another step begins.
    """
    now, ended = [words], Event()
    wait = PAUSE if pause is None else pause

    def tell() -> None:
        told = None
        while not ended.wait(wait):
            if now[0] != told:
                told = now[0]
                print(told, file=sys.stderr, flush=True)

    def say(words: str) -> None:
        now[0] = words

    clock = Thread(target=tell, daemon=True)
    clock.start()
    try:
        yield say
    finally:
        ended.set()
        clock.join()
