"""What the commands share: the terminal, progress, JSON, files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .step_lines import step_lines

if TYPE_CHECKING:
    from rich.console import Console

    from .models.progress import Progress


def existing(path: Path, command: str) -> Path:
    """The path of a file that a command is to read."""
    if not path.is_file():
        raise FileNotFoundError(f"{command}: there is no file {path}")
    return path


def text_or_file(text: str, command: str) -> str:
    """The text, or that of ``@FILE``."""
    if not text.startswith("@"):
        return text
    from .bench.text import read_text

    return read_text(existing(Path(text[1:]), command))


def in_a_folder(path: Path, command: str) -> None:
    """Raise unless a file can be written there."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{command}: there is no folder {path.absolute().parent}")


def console(stderr: bool = False) -> Console:
    """The terminal."""
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def status(words: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr, plain lines where that is no terminal; yields a function that changes its
    words."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        with step_lines(words) as say:
            yield say
        return
    with screen.status(words) as spinner:
        yield spinner.update


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr, plain lines where that is no terminal; yields
    ``advance(words, done, total)``."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        with step_lines("starting") as say:
            yield lambda words, done, total: say(f"{words} ({done} of {total})")
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def advance(words: str, done: int, total: int) -> None:
            bar.update(task, description=words, completed=done, total=total)

        yield advance


def print_json(found: Any) -> None:
    """Print plain data as JSON that every reader takes."""
    print(json.dumps(_plain(found), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(found: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(found, dict):
        return {str(key): _plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
