"""Where the sites of a transformers model are: its layers, attention and feed-forward blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import nn

Attention: TypeAlias = Literal["self", "cross"]
ATTENTIONS: tuple[str, ...] = get_args(Attention)

_OUT = ("o_proj", "out_proj", "c_proj", "wo", "dense", "proj", "o")
_MLP = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe", "fc2")
_NESTED_MLP = "DenseReluDense"  # T5: inside a block that adds the residual
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class LayerSites:
    """The modules of one layer.

    Attributes:
        layer: the layer; its output is site ``resid``.
        core: the module that calls the attention function, or ``None`` (a layer without
            such attention, as in hybrid models).
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


def find_layers(root: nn.Module, attention: Attention = "self") -> list[LayerSites]:
    """The layers of a decoder or encoder, in order; empty if it has none that look like it.

    Args:
        root: the decoder or encoder.
        attention: whose modules ``core``, ``attn`` and ``out`` are.
    """
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and any(_cores(layer, attention) for layer in module):
            return [_sites(layer, attention) for layer in module]
    return []


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _cores(layer: nn.Module, attention: Attention) -> list[tuple[str, nn.Module]]:
    """Innermost attention modules of one kind in a layer, with their paths."""
    found = []
    for path, module in layer.named_modules():
        crosses = bool(_CROSS.search(path) or _CROSS.search(type(module).__name__))
        if not _is_attention(module) or crosses != (attention == "cross"):
            continue
        if not any(_is_attention(inner) for inner in list(module.modules())[1:]):
            found.append((path, module))
    return found


def _sites(layer: nn.Module, attention: Attention) -> LayerSites:
    cores, mlp = _cores(layer, attention), _mlp(layer)
    if not cores:
        return LayerSites(layer, None, None, None, mlp)
    path, core = cores[0]
    names = path.split(".") if path else []
    # The attention block is the innermost one that also holds the output projection.
    for length in range(len(names), 0, -1):
        block = layer.get_submodule(".".join(names[:length]))
        out = _projection(block)
        if out is not None:
            return LayerSites(layer, core, block, out, mlp)
    attn = layer.get_submodule(names[0]) if names else layer
    return LayerSites(layer, core, attn, _projection(attn), mlp)


def _projection(block: nn.Module) -> nn.Module | None:
    """The output projection of an attention block."""
    named = ((name.split(".")[-1], module) for name, module in block.named_modules())
    return next((m for name, m in named if name in _OUT and hasattr(m, "weight")), None)


def _mlp(layer: nn.Module) -> nn.Module | None:
    for name, child in layer.named_children():
        if name.lower() in _MLP:
            return child
    return next((m for n, m in layer.named_modules() if n.endswith(_NESTED_MLP)), None)
