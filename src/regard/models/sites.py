"""Where the sites of a transformers model are: its layers, attention and feed-forward blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

_OUT = ("o_proj", "out_proj", "c_proj", "wo", "dense", "proj", "o")
_MLP = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe", "fc2")
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class LayerSites:
    """The modules of one layer.

    Attributes:
        layer: the layer; its output is site ``resid``.
        core: the module that calls the attention function, or ``None`` (a layer without
            self-attention, as in hybrid models).
        attn: the attention block; its output is site ``attn``.
        out: its output projection; the input is site ``heads``.
        mlp: the feed-forward block.
    """

    layer: nn.Module
    core: nn.Module | None
    attn: nn.Module | None
    out: nn.Module | None
    mlp: nn.Module | None

    def module(self, site: str, index: int) -> nn.Module:
        """The module to hook for a site.

        Raises:
            ValueError: when this kind of layer has no such part.
        """
        found = {"resid": self.layer, "attn": self.attn, "mlp": self.mlp, "heads": self.out}[site]
        if found is None:
            raise ValueError(
                f"sites: layer {index} ({type(self.layer).__name__}) has no part that regard "
                f"knows as {site!r}"
            )
        return found


def find_layers(root: nn.Module) -> list[LayerSites]:
    """The layers of a decoder or encoder, in order; empty if it has none that look like it."""
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and any(_cores(layer) for layer in module):
            return [_sites(layer) for layer in module]
    return []


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _cores(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Innermost self-attention modules of a layer, with their paths."""
    found = []
    for path, module in layer.named_modules():
        if not _is_attention(module) or _CROSS.search(path) or _CROSS.search(type(module).__name__):
            continue
        if not any(_is_attention(inner) for inner in list(module.modules())[1:]):
            found.append((path, module))
    return found


def _sites(layer: nn.Module) -> LayerSites:
    cores = _cores(layer)
    mlp = next((c for n, c in layer.named_children() if n.lower() in _MLP), None)
    if not cores:
        return LayerSites(layer, None, None, None, mlp)
    path, core = cores[0]
    attn = layer.get_submodule(path.split(".")[0]) if path else layer
    out = next(
        (m for n, m in attn.named_modules() if n.split(".")[-1] in _OUT and hasattr(m, "weight")),
        None,
    )
    return LayerSites(layer, core, attn, out, mlp)
