"""`python -m tests.golden FILE...`: replay golden files and print every output's relative error."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import ReplayError, replay_file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description="Replay golden files; exit 1 if an error is too large or a file fails.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    failed = 0
    for path in parser.parse_args(argv).files:
        try:
            results = replay_file(path)
        except ReplayError as error:
            failed += 1
            print(f"{path.name}: {error}", file=sys.stderr)
            continue
        for one in results:
            failed += not one.ok
            state = "ok" if one.ok else "TOO LARGE"
            note = f" ({one.note})" if one.note else ""
            print(f"{path.name}: {one.name}: relative error {one.error:.2e} {state}{note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
