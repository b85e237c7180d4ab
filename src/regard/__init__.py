"""regard: build, look inside, steer and measure attention in PyTorch.

Everything is loaded on first use, so that ``import regard`` costs nothing that was not asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attend": "regard.core.attend",
    "attention_stats": "regard.core.stats",
    "attend_packed": "regard.core.varlen",
    "keep_memory": "regard.core.allocator",
    "merge": "regard.core.merge",
    "recur": "regard.core.recur",
    "recur_packed": "regard.core.recur_packed",
    "BlockLayout": "regard.core.layout",
    **dict.fromkeys(
        (
            "Mask",
            "Full",
            "Causal",
            "SlidingWindow",
            "Sinks",
            "Prefix",
            "Dilated",
            "Strided",
            "Shifted",
            "Predicate",
        ),
        "regard.core.masks",
    ),
    **dict.fromkeys(("Documents", "Keys", "Dense", "PerHead"), "regard.core.data_masks"),
    "Rectangles": "regard.core.rectangle_mask",
    **dict.fromkeys(
        ("Bias", "DenseBias", "ALiBi", "RelativeBias1D", "RelativeBias2D", "LowRankBias"),
        "regard.core.bias",
    ),
    **dict.fromkeys(("patch", "watch"), "regard.models"),
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from .core.allocator import keep_memory as keep_memory
    from .core.attend import attend as attend
    from .core.bias import ALiBi as ALiBi
    from .core.bias import Bias as Bias
    from .core.bias import DenseBias as DenseBias
    from .core.bias import LowRankBias as LowRankBias
    from .core.bias import RelativeBias1D as RelativeBias1D
    from .core.bias import RelativeBias2D as RelativeBias2D
    from .core.data_masks import Dense as Dense
    from .core.data_masks import Documents as Documents
    from .core.data_masks import Keys as Keys
    from .core.data_masks import PerHead as PerHead
    from .core.layout import BlockLayout as BlockLayout
    from .core.masks import Causal as Causal
    from .core.masks import Dilated as Dilated
    from .core.masks import Full as Full
    from .core.masks import Mask as Mask
    from .core.masks import Predicate as Predicate
    from .core.masks import Prefix as Prefix
    from .core.masks import Shifted as Shifted
    from .core.masks import Sinks as Sinks
    from .core.masks import SlidingWindow as SlidingWindow
    from .core.masks import Strided as Strided
    from .core.merge import merge as merge
    from .core.rectangle_mask import Rectangles as Rectangles
    from .core.recur import recur as recur
    from .core.recur_packed import recur_packed as recur_packed
    from .core.stats import attention_stats as attention_stats
    from .core.varlen import attend_packed as attend_packed
    from .models import patch as patch
    from .models import watch as watch


def __getattr__(name: str) -> Any:
    """Load a public name from the module that holds it."""
    if name not in _HOME:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
