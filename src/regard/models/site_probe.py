"""A probe that keeps the tensors of one site."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .edit import IN_ATTENTION, Edit, Layers, Rows, Site, SiteName

if TYPE_CHECKING:
    from .calls import Pass


class SiteProbe:
    """The tensors of one site for every layer and forward pass, detached.

        with regard.watch(model, SiteProbe("weights", layers=[5], rows="last")) as seen:
            model(**inputs)
        seen.result()[0][5]                 # pass 0, layer 5: (B, H, 1, M)

    ``logits`` and ``weights`` of all rows are ``N x M`` tensors: ask for the layers, heads and rows
    that you want. Edits of patched methods are seen as they leave the site.

    Args:
        site, layers, heads, rows: as for :class:`Edit`.
        to: device on which the tensors are kept; default: where they are.
    """

    def __init__(
        self,
        site: SiteName,
        *,
        layers: Layers = None,
        heads: Collection[int] | None = None,
        rows: Rows = "all",
        to: torch.device | str | None = None,
    ) -> None:
        self.edit = Edit(site, self._keep, layers, heads, rows, observes=True)
        self.to = to
        self._passes: list[dict[int, list[Tensor]]] = []
        self._passing: Pass | None = None

    def observers(self) -> Sequence[Edit]:
        """The one edit, which only reads."""
        return (self.edit,)

    def _keep(self, x: Tensor, site: Site) -> Tensor:
        if site.passing is not self._passing:
            self._passing = site.passing
            self._passes.append({})
        kept = x.detach().clone() if self.to is None else x.detach().to(self.to, copy=True)
        self._passes[-1].setdefault(site.layer, []).append(kept)
        return x

    def result(self) -> list[dict[int, Tensor]]:
        """One entry a forward pass: layer -> tensor; layer -1 where the site has no layer."""
        rows = 2 if self.edit.site in IN_ATTENTION else 1
        return [
            {layer: torch.cat(parts, rows) for layer, parts in layers.items()}
            for layers in self._passes
        ]
