"""The command line: parses, calls, prints.

A user's mistake is one line on stderr and exit status 2; ``regard --traceback COMMAND ...`` shows
where it came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from .bench.method_text import commas, leading
from .cli_parts import console, existing, in_a_folder, print_json, progress_bar, status

if TYPE_CHECKING:
    import typer

    from .core.masks import Mask
else:
    try:
        import typer
    except ModuleNotFoundError:  # main() says what to install
        typer = None

EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "report",
    "jinja2": "report",
    "markupsafe": "report",
    "transformers": "models",
    "gguf": "models",
    "safetensors": "models",
    "accelerate": "models",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``regard`` script; always leaves through ``SystemExit``."""
    if typer is None:
        _fail(_missing("typer"))
    args = list(sys.argv[1:] if argv is None else argv)
    # The parser's own error class; typer exports only its child.
    usage_error = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
    try:
        status = _app()(args=args or ["--help"], prog_name="regard", standalone_mode=False)
    except usage_error as error:
        _fail(_one_line(error.format_message()))
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (ValueError, OSError) as error:
        if "--traceback" in args:
            raise
        _fail(_one_line(str(error)))
    except ModuleNotFoundError as error:
        if "--traceback" in args or (error.name or "").split(".")[0] not in EXTRAS:
            raise
        _fail(_missing((error.name or "").split(".")[0]))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    raise SystemExit(status or 0)


def _app() -> Any:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=False,
        rich_markup_mode=None,
        help="Attention in PyTorch: build it, look inside it, steer it, measure it.",
    )
    app.callback()(_regard)
    for command in (doctor, catalog, picture, compare):
        app.command()(command)
    from . import cli_bench
    from .cli_calibrate import calibrate
    from .cli_inspect import inspect
    from .cli_steer import steer

    app.command()(inspect)
    app.command()(steer)
    app.command()(calibrate)
    app.add_typer(cli_bench.app(), name="bench")
    return app


def _regard(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Attention in PyTorch: build it, look inside it, steer it, measure it."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also run backends that compile for a minute.")
    ] = False,
) -> None:
    """Say what works on this machine, and which backend `auto` picks for typical calls and why.

    Example: regard doctor
    """
    from . import doctor as doctors

    with status("looking") as say:
        found = doctors.report(compiled=compiled, progress=say)
    if as_json:
        print_json(found)
        return
    from .report.terminal import doctor_tables

    console().print(doctor_tables(found))


def catalog(
    key: Annotated[str | None, typer.Argument(help="Show the card of this system only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    family: Annotated[str | None, typer.Option(help="Only this family, such as sparse.")] = None,
    state: Annotated[str | None, typer.Option(help="green, partial or planned.")] = None,
) -> None:
    """List all systems, what exists of each, and with what evidence.

    Example: regard catalog --family kernel --state partial
    """
    from . import catalog as catalogs

    if key is not None:
        if family is not None or state is not None:
            raise ValueError("catalog: give a KEY, or --family and --state, not both")
        row = catalogs.find(key)
        if as_json:
            print_json(row.as_dict())
            return
        from .report.terminal import card_table

        console().print(card_table(row))
        return
    rows = catalogs.catalog(family, state)
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    from .report.terminal import catalog_table

    console().print(catalog_table(rows))


def picture(
    mask: Annotated[str, typer.Argument(help='Such as "Causal() & SlidingWindow(16)".')],
    n: Annotated[int, typer.Option("--n", help="Number of queries.", min=1)] = 64,
    m: Annotated[
        int | None, typer.Option("--m", help="Number of keys, by default as many.", min=1)
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
) -> None:
    """Draw any mask: queries downwards, keys across.

    Example: regard picture "Causal() & (SlidingWindow(16) | Sinks(4))" --png mask.png
    """
    from .report.mask_text import parse_mask

    drawn = parse_mask(mask)
    if png is not None:
        from .report.pictures import mask_png

        mask_png(drawn, n, m, path=png)
        print(f"drawn into {png}", file=sys.stderr)
    print(drawn.picture(n, m))
    print(f"{drawn!r}: {drawn.density(n, m):.1%} of {n} x {n if m is None else m} pairs")


def compare(
    model: Annotated[str, typer.Option(help="A name or a path that transformers knows.")] = (
        "smollm2"
    ),
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to read.")] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Read the sample, Milton's Paradise Lost (default).")
    ] = False,
    length: Annotated[int, typer.Option(help="Number of tokens.", min=16)] = 4096,
    methods: Annotated[
        str,
        typer.Option(
            help="Names such as window:512 or hip:prefill (questions and decoding stay dense), masks, "
            "or steering methods such as gift(alpha=3.0); commas."
        ),
    ] = "full,window,streaming",
    seed: Annotated[int, typer.Option(help="Seed of the needles and tasks.")] = 0,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Also ask long-context tasks, with exact scoring.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
) -> None:
    """Swap a language model's attention for several mechanisms; compare quality, speed, memory.

    Steering methods (regard steer --methods) take settings in brackets and need parts of a prompt. The
    first half of the text is their prompt, the second half the answer; of a prompt the first three
    quarters are the image, the rest is the text. With one of them, perplexity and agreement of every
    method are those of the answer.

    Example: regard compare --sample --methods full,window,streaming --html report.html
    """
    if sample and text is not None:
        raise ValueError("compare: give --text FILE or --sample, not both")
    if html is not None:
        in_a_folder(html, "compare")
    chosen = _methods(methods)
    source = None if text is None else existing(text, "compare")
    from .bench import compare as comparison

    with progress_bar() as advance:
        result = comparison.run(
            model=model,
            text=source,
            length=length,
            methods=chosen,
            seed=seed,
            tasks=tasks,
            progress=advance,
        )
    if html is not None:
        from .report.page import write

        write(result, html)
    if as_json:
        print_json(result)
    else:
        console().print(comparison.table(result))
    if html is not None:
        print(f"report written to {html}", file=sys.stderr)


def _methods(text: str) -> tuple[str | Mask, ...]:
    """Names and masks, separated by the commas outside of brackets. What has brackets is a mask,
    unless the word before the first one is, or is nearly, the name of a steering method. Those are
    written small, masks are not."""
    from difflib import get_close_matches

    from .catalog import cards
    from .report.mask_text import parse_mask

    names = commas(text)
    if not names:
        raise ValueError("compare: --methods names no method")
    steering = [key for key, card in cards().items() if card.family == "steer"]

    def is_mask(name: str) -> bool:
        word = leading(name)
        steers = word.islower() and get_close_matches(word, steering, n=1)
        return "(" in name and not steers

    return tuple(parse_mask(name) if is_mask(name) else name for name in names)


def _missing(module: str) -> str:
    return f"{module} is not installed; pip install 'regard[{EXTRAS[module]}]' brings it"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(words: str, status: int = 2) -> None:
    print(f"regard: {words}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
