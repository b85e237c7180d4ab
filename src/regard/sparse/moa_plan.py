"""MoA's plan: one rule for every head, and what follows from it at a length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from regard.models.made_for import MadeFor

from .moa_rules import Rule, band_blocks, check_block, rule_density, runtime_spans

_Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MoAPlan:
    """A rule for every head of every layer.

    Attributes:
        alphas, betas: `L` rows of `H` numbers, tokens and shares of the length; `H` is the number of
            key heads, or of query heads.
        block: tokens a block of the profile.
        made_for: the model that was profiled, if it is known.

    Raises:
        ValueError: rows of different lengths, or not as many alphas as betas.
    """

    alphas: _Table
    betas: _Table
    block: int = 64
    made_for: MadeFor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("alphas", "betas"):
            rows = tuple(tuple(float(x) for x in row) for row in getattr(self, name))
            object.__setattr__(self, name, rows)
        check_block("MoAPlan", self.block)
        shapes = {tuple(len(row) for row in rows) for rows in (self.alphas, self.betas)}
        if len(shapes) != 1 or len(set(sizes := shapes.pop())) != 1 or not sizes[0]:
            raise ValueError("MoAPlan: alphas and betas must be L rows of H numbers each")

    @classmethod
    def of(
        cls,
        ids: Tensor,
        rules: Sequence[Rule],
        block: int = 64,
        made_for: MadeFor | None = None,
    ) -> MoAPlan:
        """The plan that gives head `h` of layer `l` the rule `ids[l, h]`."""
        chosen = torch.tensor(rules, dtype=torch.float64)[ids]
        return cls(_table(chosen[..., 0]), _table(chosen[..., 1]), block, made_for)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.alphas), len(self.alphas[0])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Alphas and betas, float64 `(L, H)`."""
        alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in (self.alphas, self.betas))
        return alpha, beta

    def bands(self, length: int) -> Tensor:
        """Blocks of each head's band at a length in tokens, int64 `(L, H)`."""
        return band_blocks(*self.tensors(), -(-length // self.block), self.block)

    def spans(self, length: int, new_tokens: int = 0) -> Tensor:
        """Slots of each head's cache, int64 `(L, H)`: see :func:`runtime_spans`."""
        return runtime_spans(*self.tensors(), length, new_tokens)

    def density(self, length: int) -> float:
        """Mean over the heads of the widest row's share of blocks."""
        return float(rule_density(*self.tensors(), -(-length // self.block), self.block).mean())

    def grouped(self, kv_heads: int, length: int) -> MoAPlan:
        """For models that share key heads: of each group the rule with the widest span at `length`."""
        layers, heads = self.shape
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"MoAPlan.grouped: kv_heads must divide the plan's {heads} heads, got {kv_heads}"
            )
        alpha, beta = (x.view(layers, kv_heads, -1) for x in self.tensors())
        widest = (alpha + beta * length).argmax(-1, keepdim=True)
        alpha, beta = (x.gather(-1, widest)[..., 0] for x in (alpha, beta))
        return MoAPlan(_table(alpha), _table(beta), self.block, self.made_for)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, in the authors' form (`alphas`, `betas`) with the block and the model
        beside."""
        data: dict[str, object] = {"alphas": self.alphas, "betas": self.betas, "block": self.block}
        if self.made_for is not None:
            data["made_for"] = self.made_for.record()
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MoAPlan:
        """Read a plan that :meth:`save` wrote, or one of the authors' `moa_alpha_beta.json`.

        Raises:
            ValueError: another file.
        """
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(given, dict) or not {"alphas", "betas"} <= given.keys():
            raise ValueError(f"MoAPlan.load: {path} is no plan: expected alphas and betas in it")
        made_for = MadeFor.read(given.get("made_for"), f"MoAPlan.load: {path}")
        return cls(given["alphas"], given["betas"], int(given.get("block", 64)), made_for)


def _table(x: Tensor) -> _Table:
    return tuple(tuple(row) for row in x.tolist())


def pick(
    plans: Sequence[MoAPlan], score: Callable[[MoAPlan], float]
) -> tuple[MoAPlan, list[float]]:
    """The plan with the lowest score, and all scores: the validation loss at a longer length."""
    if not plans:
        raise ValueError("pick: expected at least one plan, got none")
    scores = [score(one) for one in plans]
    return plans[scores.index(min(scores))], scores
