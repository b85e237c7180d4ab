"""HyLRA's profile of a running model: one pass over a text, its last rows taken as decoding steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.token_select import key_mass
from ..models.calls import AttentionCall
from ..models.patching import watch
from .hylra_profile import LayerProfile, chunk_density, make_profile, top_chunks


class ProfileProbe:
    """Reads each layer's chunk densities and top chunks while a model runs over a text.

    Args:
        steps: how many of the last rows count as decoding steps.
        chunk: keys a chunk.
        keep: tokens of a layer's top set.
        sink, recent: first and last tokens that are always in it. All three are rounded down to chunks.

    Raises:
        ValueError: while watching, at padded input or at a layer whose weights are no softmax.
    """

    def __init__(
        self, steps: int = 32, chunk: int = 64, keep: int = 2048, sink: int = 64, recent: int = 512
    ) -> None:
        if steps < 1 or chunk < 1 or keep < chunk or sink < 0 or recent < 0:
            raise ValueError(
                "profile: steps and chunk must be >= 1, keep >= chunk, sink and recent >= 0; got "
                f"steps={steps}, chunk={chunk}, keep={keep}, sink={sink}, recent={recent}"
            )
        self.steps, self.chunk, self.keep = steps, chunk, keep
        self.sink, self.recent = sink, recent
        self._density: dict[int, list[Tensor]] = {}
        self._chosen: dict[int, list[Tensor]] = {}

    def attention(self, call: AttentionCall, out: Tensor) -> None:
        """Record one layer of one pass."""
        why = call.not_softmax or ("has sinks" if call.sinks is not None else None)
        if why is not None:
            raise ValueError(
                f"profile: layer {call.layer} {why}, so that its weights are not known"
            )
        if call.own.valid is not None:
            raise ValueError("profile: the text is padded; give sequences of one length")
        self.read(call.layer, call.q, call.k, call.scale)

    @torch.no_grad()
    def read(self, layer: int, q: Tensor, k: Tensor, scale: float | None = None) -> None:
        """Record ``q`` ``(B, H, N, D)``, the last of ``M`` positions, against ``k`` of one layer."""
        n, m = q.shape[2], k.shape[2]
        steps = min(self.steps, n)
        strips = key_mass(q, k, block=self.chunk, share="kv", scale=scale, rows=steps)
        mass = torch.cat([mass for mass, _ in strips], 2)
        chunks = torch.arange(m - steps, m, device=q.device) // self.chunk + 1
        sizes = (x // self.chunk for x in (self.keep, self.sink, self.recent))
        chosen = top_chunks(mass, chunks, *sizes)
        # Every sequence of the batch brings further steps.
        density = chunk_density(mass, chunks).transpose(0, 1).flatten(1)
        self._density.setdefault(layer, []).append(density)
        self._chosen.setdefault(layer, []).append(chosen.transpose(0, 1).flatten(1, 2))

    def result(self) -> LayerProfile:
        """The profile of all that was read.

        Raises:
            ValueError: nothing was read, or not the same in every layer.
        """
        layers = sorted(self._density)
        if not layers or layers != list(range(len(layers))):
            raise ValueError(f"profile: layers {layers} were read, expected all from 0 on")
        wide = max(x.shape[-1] for found in self._chosen.values() for x in found)
        chosen = [torch.cat([_padded(x, wide) for x in self._chosen[layer]], 1) for layer in layers]
        if len({x.shape for x in chosen}) > 1:
            raise ValueError("profile: the layers differ in their key heads or in what was read")
        return make_profile(
            [torch.cat(self._density[layer], 1) for layer in layers],
            chosen,
            chunk=self.chunk,
            keep=self.keep,
            sink=self.sink,
            recent=self.recent,
        )


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


@torch.no_grad()
def profile(
    model: Any,
    ids: Tensor,
    *,
    chunk: int = 64,
    sink: int = 64,
    recent: int = 512,
    keep: int = 2048,
    steps: int = 32,
) -> LayerProfile:
    """The profile of a transformers model on calibration texts, streamed layer by layer.

    Args:
        model: as for :func:`regard.watch`.
        ids: token ids ``(B, N)`` without padding; the last ``steps`` rows of each are its steps.
        chunk, sink, recent, keep, steps: as :class:`ProfileProbe`, in tokens.

    Returns:
        Densities and overlaps; hand them to :func:`~regard.sparse.hylra_plan.plan`.
    """
    probe = ProfileProbe(steps, chunk, keep, sink, recent)
    with watch(model, probe):
        model(input_ids=ids, use_cache=False)
    return probe.result()
