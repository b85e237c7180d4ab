"""``regard calibrate``: what a method needs to know of a model, measured and written to a small file."""

from __future__ import annotations

import difflib
import inspect
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..catalog import cards
from ..data import sample_text
from ..models import MadeFor, load
from ..models.load import DEFAULT
from ..models.progress import Progress
from .calibrate_given import IMAGE, Given
from .calibrations import KINDS, Kind
from .method_text import literal
from .steering import parts
from .text import read_text, tokens
from .timing import machine

# A context of more signs than this is not repeated in the command that uses the file.
_LONG = 200


def known() -> list[dict[str, Any]]:
    """What can be calibrated, as plain data: name, paper, what it reads, settings with defaults."""
    found, every = [], cards()
    for name, kind in KINDS.items():
        card = every[name]
        found.append(
            {
                "name": name,
                "title": card.title,
                "arxiv": card.arxiv,
                "needs": kind.needs,
                "use": f"regard {kind.use}",
                "length": kind.length,
                "layers": kind.layers,
                "settings": {key: repr(x) for key, x in _defaults(kind).items()},
            }
        )
    return found


def run(
    name: str,
    path: Path | str,
    *,
    model: str = DEFAULT,
    context: str | None = None,
    prompt: str | None = None,
    text: Path | str | None = None,
    length: int | None = None,
    layers: Sequence[int] | None = None,
    settings: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Calibrate a method for a model and write the file that the method reads.

    The file appears whole or not at all. Mistakes are reported before the model is loaded.

    Args:
        name: ``act``, ``var``, ``hylra``, ``moa`` (from a text), ``vhr``, ``vista`` (from a prompt).
        path: the file to write.
        model: a name for :func:`regard.models.load`.
        context: what a prompt is about; it plays the image.
        prompt: the question that follows it.
        text: a UTF-8 file, by default the sample text of the package.
        length: tokens of the text, from its start; default see :func:`known`.
        layers: those that are tried or steered; default see :func:`known`.
        settings: ``KEY=VALUE``, knobs of the method and of its calibration; see :func:`known`.
        force: replace a file that exists.
        progress: called with (words, steps done, steps in all).

    Returns:
        Plain data: ``found`` (``heads``, ``dims`` or ``layers``, and what else was measured), ``read``
        (the text or the prompt), ``file``, ``bytes``, ``settings``, ``layers``, ``use`` (the command
        that uses the file), ``seconds``, ``machine``.

    Raises:
        ValueError: an unknown name, a missing or wrong setting, a text that is too short, or nothing
            that could be found.
        OSError: there is no such folder, the file exists, or it cannot be written.
    """
    kind = _kind(name)
    chosen = _settings(name, kind, settings)
    _check(name, kind, context, prompt, text, length, layers)
    target = Path(path)
    say = progress or (lambda words, done, total: None)
    start = time.perf_counter()
    with _part(target, force) as part:
        say(f"loading {model}", 0, 2)
        loaded, tokenizer = load(model)
        loaded.eval()
        depth = int(loaded.config.get_text_config().num_hidden_layers)
        wrong = [layer for layer in layers or () if not 0 <= layer < depth]
        if wrong:
            raise ValueError(f"calibrate: layers {wrong}, but {model} has {depth}")
        only = None if layers is None else sorted(set(layers))
        made_for = MadeFor.of(loaded, model)
        if kind.needs == "prompt":
            assert prompt is not None and context is not None
            ids, spans = parts(tokenizer, prompt, context, IMAGE, "calibrate")
            given = Given(loaded, ids.to(loaded.device), None, spans, only, progress, made_for)
            given.fits(ids.shape[1])
            read: dict[str, Any] = {"prompt": prompt, "context": context}
        else:
            count = kind.length if length is None else length
            assert count is not None
            ids, after = _read(tokenizer, text, count, loaded.device)
            given = Given(loaded, ids, after, None, only, progress, made_for)
            read = {"text": "sample" if text is None else Path(text).name}
        say(f"calibrating {name}", 1, 2)
        save, found = kind.make(given, **chosen)
        save(str(part))
    say("done", 2, 2)
    return {
        "name": name,
        "model": model,
        "read": {**read, "tokens": int(ids.shape[1])},
        "layers": only,
        "settings": {**_defaults(kind), **chosen},
        "found": found,
        "file": str(path),
        "bytes": target.stat().st_size,
        "use": _use(name, kind, str(path), model, context, prompt),
        "seconds": time.perf_counter() - start,
        "machine": machine(),
    }


def _kind(name: str) -> Kind:
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KINDS)}"
        raise ValueError(f"calibrate: nothing to calibrate for {name!r}; {hint}")
    return KINDS[name]


def _defaults(kind: Kind) -> dict[str, Any]:
    """The settings of a calibration: the keywords of its function."""
    keys = inspect.signature(kind.make).parameters.values()
    return {key.name: key.default for key in keys if key.kind is key.KEYWORD_ONLY}


def _settings(name: str, kind: Kind, settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as keywords of the type that the calibration takes."""
    hints, allowed = get_type_hints(kind.make), _defaults(kind)
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, words = setting.partition("=")
        if not equals:
            raise ValueError(f"calibrate: --set takes KEY=VALUE, got {setting!r}")
        if key not in allowed:
            raise ValueError(
                f"calibrate: {name} has no setting {key!r}; it has {', '.join(allowed)}"
            )
        hint = hints[key]
        value: Any = words if hint is str else literal(words)
        # Python takes True for 1, and a user who wrote one of them did not mean the other.
        fits = hint is bool if isinstance(value, bool) else isinstance(value, hint)
        if isinstance(value, int) and not fits and not isinstance(value, bool):
            value = float(value)
            fits = isinstance(value, hint)
        if not fits:
            expected = getattr(hint, "__name__", str(hint)).replace(" | ", " or ")
            raise ValueError(f"calibrate: {name}'s {key} must be {expected}, got {words!r}")
        given[key] = value
    return given


def _check(
    name: str,
    kind: Kind,
    context: str | None,
    prompt: str | None,
    text: Path | str | None,
    length: int | None,
    layers: Sequence[int] | None,
) -> None:
    """Raise unless what was given is what the calibration reads."""
    if kind.needs == "prompt":
        if text is not None or length is not None:
            raise ValueError(f"calibrate: {name} reads a prompt; leave --text and --length away")
        for option, value in (("prompt", prompt), ("context", context)):
            if value is None or not value.strip():
                raise ValueError(
                    f"calibrate: {name} compares a prompt with and without its context; give "
                    f"--{option} TEXT"
                )
    elif context is not None or prompt is not None:
        raise ValueError(f"calibrate: {name} reads a text; leave --context and --prompt away")
    if length is not None and length < 2:
        raise ValueError(f"calibrate: length must be >= 2, got {length}")
    if layers is not None and kind.layers is None:
        raise ValueError(f"calibrate: {name} takes all layers; leave --layers away")
    if layers is not None and not layers:
        raise ValueError("calibrate: layers is empty; name one at least")


@contextmanager
def _part(path: Path, force: bool) -> Iterator[Path]:
    """A file beside ``path`` that takes its name when all went well, and goes when it did not."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"calibrate: there is no folder {folder}")
    if path.is_dir():
        raise IsADirectoryError(f"calibrate: {path} is a folder; name a file")
    if path.exists() and not force:
        raise FileExistsError(f"calibrate: {path} exists; --force replaces it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.touch(exist_ok=False)
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)  # safetensors makes files that only their owner reads
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read(
    tokenizer: Any, text: Path | str | None, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The first ``length`` tokens of a text, and as many behind them where it has them."""
    content = sample_text() if text is None else read_text(text)
    name = "the sample text" if text is None else str(text)
    ids = tokens(tokenizer, content, length, name).to(device)
    more = tokenizer(content[: 32 * length], add_special_tokens=False)["input_ids"]
    after = more[length : 2 * length]
    return ids, None if len(after) < length else ids.new_tensor(after)[None]


def _use(
    name: str, kind: Kind, path: str, model: str, context: str | None, prompt: str | None
) -> str:
    """The command that uses the file; words in capitals are left to the user."""
    if kind.use == "compare":
        words = ["regard", "compare", "--methods", f"{name}@{path}"]
    else:
        words = ["regard", "steer", "--method", name, "--set", f"file={path}"]
    if model != DEFAULT:
        words += ["--model", model]
    if kind.context:
        told = context is not None and len(context) <= _LONG
        words += ["--context", str(context) if told else "CONTEXT"]
    if kind.use == "steer":
        words += ["--prompt", "PROMPT" if prompt is None else prompt]
    return shlex.join(words)
