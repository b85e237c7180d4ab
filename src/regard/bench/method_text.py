"""Lists of methods as text: commas that separate, settings in brackets, and their values."""

from __future__ import annotations

import ast
import re
from typing import Any


def commas(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets, without spaces; empty ones dropped."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def called(text: str) -> tuple[str, list[str]]:
    """Name and settings of ``NAME`` or ``NAME(KEY=VALUE, ...)``.

    Raises:
        ValueError: the brackets do not close at the end.
    """
    name, bracket, inside = text.strip().partition("(")
    if not bracket:
        return name, []
    if not inside.endswith(")"):
        raise ValueError(f"compare: {text!r}: a bracket after the name closes at the end")
    return name.strip(), commas(inside[:-1])


def leading(text: str) -> str:
    """The word before the first bracket, ``""`` if there is none: ``gift`` of ``gift(alpha=3.0)``."""
    found = re.match(r"\s*([\w-]+)\s*\(", text)
    return found[1] if found else ""


def literal(text: str) -> Any:
    """The value of a Python literal (a number, a text, a tuple, ...); what is none is a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
