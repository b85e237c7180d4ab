"""A mask from its text, ``"Causal() & (SlidingWindow(16) | Sinks(4))"``: the inverse of its repr.

The text is parsed, never evaluated: names of masks, numbers, lists, ``& | ~``, and a text or None where
a mask takes one.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from itertools import zip_longest
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ..core import data_masks, masks, rectangle_mask
from ..core.masks import Mask
from ..patterns import clear_mask, halonet_mask, neighborhood_mask, power, radial, s2_pattern

# Dense and Documents of this many numbers are still text that somebody pasted.
MAX_CHARACTERS = 20_000

_PATTERNS = (power, s2_pattern, radial, neighborhood_mask, clear_mask, halonet_mask)

# What the masks themselves take for granted.
_KINDS: dict[str, Any] = {"mask": Mask, "masks": (list, tuple), "by": int}

_VECTOR = {"Documents": torch.int64, "Keys": torch.bool, "Dense": torch.bool}


def _makers() -> dict[str, Callable[..., Mask]]:
    """The masks that a text can name, by name; a Predicate is a function and has no text."""
    inner = {"Mask", "GridMask", "MaskAround", "MaskGroup", "And", "Or", "Not", "Predicate"}
    return {
        name: kind
        for module in (masks, data_masks, rectangle_mask, *_PATTERNS)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, Mask) and not name.startswith("_")
        if name not in inner
    }


def parse_mask(text: str) -> Mask:
    """The mask that a text describes.

    Args:
        text: for example ``"Causal() & ~Strided(3)"`` or ``"PerHead([Causal(), Full()])"``.
            Vectors are lists, bare or as ``torch.tensor([0, 0, 1])``, so that every repr can be
            pasted back.

    Raises:
        ValueError: the text is no mask; the message says which part and what would be one.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"mask: the text has {len(text)} characters, at most {MAX_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        found = _Parser(_makers()).value(tree.body)
    except SyntaxError as error:
        at = f" near column {error.offset}" if error.offset else ""
        raise ValueError(f"mask: cannot read {_short(text)}{at}: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"mask: {_short(text)} is nested too deeply") from error
    if not isinstance(found, Mask):
        raise ValueError(
            f"mask: {_short(text)} is no mask; write for example Causal() & SlidingWindow(16)"
        )
    return found


class _Parser:
    """Walks the syntax tree and builds masks and plain values."""

    def __init__(self, makers: dict[str, Callable[..., Mask]]) -> None:
        self.makers = makers

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp):
            return self._join(node)
        if isinstance(node, ast.UnaryOp):
            return self._unary(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self.value(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            self._maker(node.id)
            raise ValueError(f"mask: {node.id} needs its brackets: {node.id}{self._usage(node.id)}")
        raise ValueError(
            f"mask: {_short(ast.unparse(node))} is not allowed here; a mask is made of "
            "names, whole numbers, lists and & | ~"
        )

    def _join(self, node: ast.BinOp) -> Mask:
        if not isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            raise ValueError(f"mask: {_short(ast.unparse(node))}: masks combine with & | ~ only")
        left, right = self._mask(node.left), self._mask(node.right)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right

    def _unary(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Invert):
            return ~self._mask(node.operand)
        value = self.value(node.operand)
        if isinstance(node.op, ast.USub) and type(value) is int:
            return -value
        raise ValueError(f"mask: {_short(ast.unparse(node))}: masks combine with & | ~ only")

    def _mask(self, node: ast.expr) -> Mask:
        value = self.value(node)
        if not isinstance(value, Mask):
            raise ValueError(f"mask: expected a mask beside & | ~, got {_short(ast.unparse(node))}")
        return value

    def _call(self, node: ast.Call) -> Any:
        if ast.unparse(node.func) == "torch.tensor" and len(node.args) == 1 and not node.keywords:
            return self.value(node.args[0])
        if not isinstance(node.func, ast.Name):
            raise ValueError(f"mask: {_short(ast.unparse(node.func))} is not the name of a mask")
        name = node.func.id
        maker = self._maker(name)
        if any(word.arg is None for word in node.keywords):
            raise ValueError(f"mask: {name}: ** is not allowed")
        signature, hints = inspect.signature(maker), get_type_hints(maker)
        kinds = [hints.get(word) for word in signature.parameters]
        args = [
            self._argument(name, arg, kind)
            for arg, kind in zip_longest(node.args, kinds[: len(node.args)])
        ]
        named = {
            str(word.arg): self._argument(name, word.value, hints.get(str(word.arg)))
            for word in node.keywords
        }
        try:
            given = signature.bind(*args, **named).arguments
        except TypeError as error:
            raise ValueError(f"mask: {name}: {error}; it is {name}{self._usage(name)}") from error
        for word, value in given.items():
            # Python takes True for 1, and a list for a flag; a person who types it means neither.
            wrong = hints.get(word) in (int, bool) and type(value) is not hints[word]
            if wrong or (word in _KINDS and not isinstance(value, _KINDS[word])):
                raise ValueError(f"mask: {name}: {word} cannot be {value!r}")
        try:
            return maker(*args, **named)
        except TypeError as error:
            raise ValueError(
                f"mask: {_short(ast.unparse(node))} cannot be made: {error}"
            ) from error

    def _argument(self, name: str, node: ast.expr, hint: Any) -> Any:
        # None, texts and broken numbers stand only where the mask says that it takes them.
        if isinstance(node, ast.Constant) and type(node.value) in _kinds(hint):
            return node.value
        value = self.value(node)
        if name not in _VECTOR or not isinstance(value, (list, tuple)):
            return value
        try:
            return torch.tensor(value, dtype=_VECTOR[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"mask: {name}: expected lists of numbers, {error}") from error

    def _maker(self, name: str) -> Callable[..., Mask]:
        if name in self.makers:
            return self.makers[name]
        by_lower = {known.lower(): known for known in self.makers}
        close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
        hint = f" Did you mean {by_lower[close[0]]}?" if close else ""
        known = ", ".join(sorted(self.makers))
        raise ValueError(f"mask: there is no {name}.{hint} There are: {known}")

    def _usage(self, name: str) -> str:
        words = [
            word.name if word.default is word.empty else f"{word.name}={word.default!r}"
            for word in inspect.signature(self.makers[name]).parameters.values()
        ]
        return f"({', '.join(words)})"


def _kinds(hint: Any) -> set[Any]:
    """The kinds of single values that an annotation names."""
    origin = get_origin(hint)
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    if origin in (Union, UnionType):
        return {kind for part in get_args(hint) for kind in _kinds(part)}
    return {hint}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")
