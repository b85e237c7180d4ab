"""Models: loading them, and the seam through which methods and probes enter a running one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .load import load as load

if TYPE_CHECKING:
    from .ablation import ablate as ablate
    from .activations import Put as Put
    from .activations import Restore as Restore
    from .activations import capture as capture
    from .branches import drop_span as drop_span
    from .calls import AttentionCall as AttentionCall
    from .calls import Pass as Pass
    from .chat import chat_spans as chat_spans
    from .edit import After as After
    from .edit import Edit as Edit
    from .edit import In as In
    from .edit import Site as Site
    from .effects import logit_difference as logit_difference
    from .effects import patch_effects as patch_effects
    from .heads import HeadMask as HeadMask
    from .heads import mean_heads as mean_heads
    from .heads import random_heads as random_heads
    from .heads import rank as rank
    from .made_for import MadeFor as MadeFor
    from .maps_probe import MapsProbe as MapsProbe
    from .method import Method as Method
    from .method import Probe as Probe
    from .moves import move as move
    from .patching import fork as fork
    from .patching import patch as patch
    from .patching import watch as watch
    from .pieces import prefill as prefill
    from .select_method import SelectMethod as SelectMethod
    from .site_probe import SiteProbe as SiteProbe
    from .spans import Spans as Spans
    from .stats_probe import StatsProbe as StatsProbe
    from .table import Table as Table

_WHERE = {
    "HeadMask": "heads",
    "MadeFor": "made_for",
    "Put": "activations",
    "Restore": "activations",
    "Table": "table",
    "ablate": "ablation",
    "capture": "activations",
    "chat_spans": "chat",
    "drop_span": "branches",
    "logit_difference": "effects",
    "mean_heads": "heads",
    "move": "moves",
    "patch_effects": "effects",
    "prefill": "pieces",
    "random_heads": "heads",
    "rank": "heads",
    "After": "edit",
    "AttentionCall": "calls",
    "Edit": "edit",
    "In": "edit",
    "MapsProbe": "maps_probe",
    "Method": "method",
    "Pass": "calls",
    "Probe": "method",
    "Site": "edit",
    "SelectMethod": "select_method",
    "SiteProbe": "site_probe",
    "Spans": "spans",
    "StatsProbe": "stats_probe",
    "fork": "patching",
    "patch": "patching",
    "watch": "patching",
}
__all__ = sorted([*_WHERE, "load"])


def __getattr__(name: str) -> Any:
    # on first use: transformers takes seconds to import, and is an extra
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        raise ImportError(
            f"regard.models.{name} needs transformers: pip install 'regard[models]'"
        ) from error
