"""``regard calibrate``: measure what a method needs to know of a model, into a small file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import console, existing, print_json, progress_bar, text_or_file


def calibrate(
    name: Annotated[
        str | None, typer.Argument(help="What to calibrate; --methods lists the names.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
    model: Annotated[str, typer.Option(help="A name or a path that transformers knows.")] = (
        "smollm2"
    ),
    context: Annotated[
        str | None,
        typer.Option(help="What the prompt is about: the text, or a file with it as @FILE."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The question.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to read, by default Milton's Paradise Lost.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of the text.", min=2)] = None,
    layers: Annotated[str | None, typer.Option(help="Layers, such as 2,3,4.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE; repeat it for more.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="List what can be calibrated and end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a method needs to know of a model, and write the file that the method reads.

    act, var, hylra and moa read a text; vhr and vista a prompt with its context. The file says which
    model it is for: one of another shape is refused. The last line is the command that uses the file.

    Example: regard calibrate act --layers 14,15,16 --out act.safetensors
    """
    from .bench import calibrating

    if methods:
        from .report.calibrate_table import known_table

        if as_json:
            print_json(calibrating.known())
        else:
            console().print(known_table(calibrating.known()))
        return
    if name is None or out is None:
        raise ValueError("calibrate: give a NAME and --out FILE (--methods lists the names)")
    with progress_bar() as advance:
        result = calibrating.run(
            name,
            out,
            model=model,
            context=None if context is None else text_or_file(context, "calibrate"),
            prompt=prompt,
            text=None if text is None else existing(text, "calibrate"),
            length=length,
            layers=None if layers is None else _layers(layers),
            settings=setting or [],
            force=force,
            progress=advance,
        )
    if as_json:
        print_json(result)
        return
    from .report.calibrate_table import calibrate_table

    console().print(calibrate_table(result))
    print(result["use"])


def _layers(text: str) -> list[int]:
    """``2,3,4`` as numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"calibrate: --layers must be whole numbers with commas, got {text!r}")
    return [int(part) for part in parts]
