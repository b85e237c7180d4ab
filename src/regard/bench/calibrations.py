"""What ``regard calibrate`` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .calibrate_given import Made
from .calibrate_sparse import hylra, moa
from .calibrate_steer import act, var, vhr, vista


@dataclass(frozen=True)
class Kind:
    """One calibration.

    Attributes:
        make: reads what is given, with the settings as keywords; returns what writes the file, and
            plain data about what was found.
        needs: a ``"text"``, or a ``"prompt"`` with its context.
        use: the command that reads the file.
        length: tokens of the text by default.
        layers: what a choice of layers means; ``None`` where there is none.
        context: whether the method steers only where the prompt has a context.
    """

    make: Callable[..., Made]
    needs: Literal["text", "prompt"]
    use: Literal["steer", "compare"]
    length: int | None = None
    layers: str | None = None
    context: bool = False


KINDS: dict[str, Kind] = {
    "act": Kind(act, "text", "steer", 256, "tried (default all but the first two and the last)"),
    "var": Kind(var, "text", "steer", 256, "edited (default from the third on)", True),
    "vhr": Kind(
        vhr, "prompt", "steer", None, "reinforced (default the second and the last 7/16)", True
    ),
    "vista": Kind(vista, "prompt", "steer", None, "steered (default all)", True),
    "hylra": Kind(hylra, "text", "compare", 1024),
    "moa": Kind(moa, "text", "compare", 2048),
}
