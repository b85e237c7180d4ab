"""Methods of ``regard compare`` that read what was calibrated or trained for a model: NAME@FILE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..core.token_select import TopTokens
from ..models.method import Method
from ..sparse.hylra import LayerReuse
from ..sparse.hylra_plan import ReusePlan
from ..sparse.moa import MoA
from ..sparse.moa_plan import MoAPlan
from ..sparse.seer import load_gates
from ..sparse.seer_method import Seer


def _hylra(path: Path, keys: int) -> Method:
    plan = ReusePlan.load(path)
    return LayerReuse(plan.policy, plan.full, TopTokens(keys), made_for=plan.made_for)


# name -> (what the file is, method of the file and of the keys that a query reads)
CALIBRATED: dict[str, tuple[str, Callable[[Path, int], Method]]] = {
    "seer": (
        "gates of save_gates (safetensors)",
        lambda path, keys: Seer(load_gates(path), keep=max(1, keys // 64)),
    ),
    "moa": ("plan of MoAPlan.save (JSON)", lambda path, keys: MoA(MoAPlan.load(path))),
    "hylra": ("plan of ReusePlan.save (JSON)", _hylra),
}
