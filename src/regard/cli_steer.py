"""``regard steer``: one method on one prompt, before and after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_parts import console, in_a_folder, print_json, progress_bar, text_or_file


def steer(
    method: Annotated[
        str | None, typer.Option(help="Name of a method; --methods lists them.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The question.")] = None,
    context: Annotated[
        str | None, typer.Option(help="What it is about: the text, or a file with it as @FILE.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the method; repeat it for more.")
    ] = None,
    role: Annotated[str, typer.Option("--as", help="What the context's span is called.")] = "image",
    model: Annotated[str, typer.Option(help="A name or a path that transformers knows.")] = (
        "smollm2"
    ),
    tokens: Annotated[int, typer.Option(help="Most tokens of the answer.", min=1)] = 32,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    methods: Annotated[bool, typer.Option("--methods", help="List the methods and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Steer a running model by a published method and see what changed, side by side.

    Example: regard steer --method vhr --set alpha=1.5 --context "The key is under the third stone."
    --prompt "Where is the key?"
    """
    from .bench.steer_names import build, every, known

    if methods:
        from .report.steer_table import methods_table

        if as_json:
            print_json(every())
        else:
            console().print(methods_table(known()))
        return
    if method is None or prompt is None:
        raise ValueError("steer: give --method NAME and --prompt TEXT (--methods lists the names)")
    if html is not None:
        in_a_folder(html, "steer")
    chosen = build(method, setting or [])
    from .bench import steering

    with progress_bar() as advance:
        result = steering.run(
            chosen,
            prompt,
            name=method,
            context=None if context is None else text_or_file(context, "steer"),
            role=role,
            model=model,
            tokens=tokens,
            progress=advance,
        )
    if html is not None:
        from .report.steer_page import write

        write(result, html)
    if as_json:
        print_json(result)
    else:
        from .report.steer_table import steer_table

        console().print(steer_table(result))
    if html is not None:
        print(f"page written to {html}", file=sys.stderr)
