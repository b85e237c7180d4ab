"""Inference with landmarks: read a few blocks of a long past (arXiv 2305.16300, section 3.3).

Every block of the past is represented by its landmark's key. A query reads the `topk` blocks whose
landmarks it likes best, and the local text, under one grouped softmax. So that a model trained on
short texts meets no distance that it does not know, the memory gets `topk + 1` block slots before the
local text: retrieved blocks stand there in the order of their age, and one among the last `topk` blocks
moves a slot up, so that the newest keeps its true distance.

The cache keeps keys at their true positions and moves queries instead: scores depend on differences
only, and a query has as many copies as blocks that it reads, where a block has many readers. Checked
against epfml/landmark-attention, `lm_benchmark/models/caches/mem_cache.py`. It differs in one place:
with no more than `topk` blocks these stand at their true distances, where that code needs at least
`topk` and lets the newest of exactly `topk` coincide with the local text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.merge import merge
from regard.core.rope import rope
from regard.core.row_blocks import attend_row_blocks
from regard.core.select import choose_blocks

from .landmark import landmark_attention

__all__ = ["LandmarkCache"]

MODES = ("token_head", "head", "token", "random")


class LandmarkCache:
    """Keys, values and landmarks of one layer and one sequence, with retrieval.

    Args:
        block: `f`, regular tokens a block; each block ends in a landmark.
        topk: blocks that a query reads besides the local text; 0 reads none.
        mode: what shares a choice. `"token_head"`: nothing, each token and head chooses. `"head"`:
            all heads of a token, by the largest share of attention over them. `"token"`: all tokens of
            a segment, by the largest share over them; later tokens of a segment then have a say in what
            earlier ones read, as in the paper. `"random"`: a baseline that does not look.
        remap: move blocks into the slots described above; otherwise true distances.
        base: of the rotary embedding; `None` where the model has no rotary positions.
        scale: factor on the scores, default `D ** -0.5`.
        generator: source of randomness of `"random"`.

    Attributes:
        length: tokens seen.
        blocks: closed blocks in the memory.
        last_choice: the blocks that the last call's queries read, int64 `(B, H, T, min(topk, blocks))`,
            `None` as long as none was read.
    """

    def __init__(
        self,
        block: int,
        topk: int,
        mode: str = "token_head",
        *,
        remap: bool = True,
        base: float | None = 10000.0,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value, least in (("block", block, 1), ("topk", topk, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"LandmarkCache: {name} must be an integer >= {least}, got {value!r}"
                )
        if mode not in MODES:
            raise ValueError(f"LandmarkCache: mode must be one of {MODES}, got {mode!r}")
        self.block, self.topk, self.mode, self.remap = block, topk, mode, remap
        self.base, self.scale, self.generator = base, scale, generator
        self.length = 0
        self.last_choice: Tensor | None = None
        self._memory: tuple[Tensor, Tensor, Tensor] | None = None
        self._open: tuple[Tensor, Tensor] | None = None

    @property
    def period(self) -> int:
        """Tokens of a block with its landmark."""
        return self.block + 1

    @property
    def blocks(self) -> int:
        return 0 if self._memory is None else self._memory[2].shape[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_landmark: Tensor) -> Tensor:
        """Attention of the next tokens, which are then kept.

        The local text is what stood in no closed block before, and these tokens; its own blocks are all
        read. One token at a time therefore reads at most `topk` blocks and its own.

        Args:
            q, k, v: `(B, H, T, D)`, `(B, Hkv, T, D)`, `(B, Hkv, T, Dv)`, before the rotary embedding.
            is_landmark: bool `(T,)` or `(B, T)`: every `block + 1`-th token since the first.

        Returns:
            `(B, H, T, Dv)`.

        Raises:
            ValueError: a block that does not end in a landmark, or one inside a block.
        """
        batch, t = q.shape[0], q.shape[2]
        at = torch.arange(self.length, self.length + t, device=q.device)
        expected = at % self.period == self.block
        if is_landmark.shape not in ((t,), (batch, t)) or bool((is_landmark != expected).any()):
            raise ValueError(
                f"LandmarkCache: is_landmark {tuple(is_landmark.shape)} must mark each token "
                f"{self.block} of {self.period} counted from the first of the sequence, for these "
                f"{t} tokens after {self.length}"
            )
        keys, values = self._turn(k, at), v
        if self._open is not None:
            keys, values = torch.cat([self._open[0], keys], 2), torch.cat([self._open[1], v], 2)
        started = self.length - self.length % self.period
        marked = torch.arange(started, self.length + t, device=q.device) % self.period == self.block
        out, lse = landmark_attention(
            self._turn(q, at), keys, values, marked, scale=self.scale, return_lse=True
        )
        if self.blocks and self.topk:
            wide = out.to(lse.dtype)
            wide, _ = merge([(wide, lse), *self._retrieved(q, at - started)])
            out = wide.to(out.dtype)
        self._keep(k, keys, values, started)
        self.length += t
        return out

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.base is None else rope(x, positions, self.base)

    def _retrieved(self, q: Tensor, local: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parts `(out, logit of the landmark)` of the blocks that each query reads.

        Args:
            q: unrotated.
            local: place of each query in the local text, `(T,)`.
        """
        assert self._memory is not None
        keys, values, marks = self._memory
        count, keep = self.blocks, min(self.topk, self.blocks)
        moved = self.remap and count > self.topk
        age = torch.arange(count, device=q.device)
        recent = age - (count - self.topk) + 1
        slots = recent.clamp(min=0) if moved else age
        position = local + self.period * (self.topk + 1 if moved else count)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale

        heads = marks.repeat_interleave(q.shape[1] // marks.shape[1], 1)
        placed = self._turn(heads, slots * self.period + self.block)
        logits = (self._turn(q, position) @ placed.mT) * scale
        choice = self._choose(logits, keep)
        order = torch.arange(keep, device=q.device)
        slot = order + (choice >= count - self.topk) if moved else choice
        # The query stands as far behind a block's true place as it should behind its slot.
        stand = position[:, None] + (choice - slot) * self.period
        rows = self._turn(q[:, :, :, None].expand(*choice.shape, -1), stand)
        mark = heads[:, :, None].expand(-1, -1, choice.shape[2], -1, -1)
        mark = mark.gather(3, choice[..., None].expand(*choice.shape, mark.shape[-1]))
        mark = self._turn(mark, choice * self.period + self.block)
        level = (rows * mark).sum(-1) * scale
        out, lse = attend_row_blocks(
            rows.flatten(2, 3), keys, values, choice.flatten(2, 3), self.block, scale=scale
        )
        out, level = out.unflatten(2, choice.shape[2:]), level.to(lse.dtype)
        self.last_choice = choice
        return list(zip(out.unbind(3), level.unbind(-1), strict=True))

    def _choose(self, logits: Tensor, keep: int) -> Tensor:
        """The blocks that each query reads, ascending, `(B, H, T, keep)`."""
        shares = logits.softmax(-1)
        if self.mode == "head":
            shares = shares.amax(1, keepdim=True)
        elif self.mode == "token":
            shares = shares.amax(2, keepdim=True)
        elif self.mode == "random":
            shares = torch.rand(shares.shape, generator=self.generator).to(shares.device)
        chosen = choose_blocks(shares, torch.ones_like(shares, dtype=torch.bool), keep)
        listed = chosen.nonzero()[:, -1].view(*chosen.shape[:-1], keep)
        return listed.expand(*logits.shape[:-1], keep)

    def _keep(self, k: Tensor, keys: Tensor, values: Tensor, started: int) -> None:
        """Put what the new tokens close into the memory, the rest aside.

        The memory is copied once a block, which is what a query's look at all landmarks costs.

        Args:
            k: new keys, unrotated.
            keys, values: the local text from position `started` on, keys rotated.
        """
        whole = keys.shape[2] // self.period
        end = whole * self.period
        if whole:
            first = started + self.block - self.length
            marks = k[:, :, first :: self.period]
            new = [x[:, :, :end].unflatten(2, (whole, self.period)) for x in (keys, values)]
            fresh = (*(x[:, :, :, :-1].flatten(2, 3) for x in new), marks)
            if self._memory is None:
                self._memory = fresh[0], fresh[1], fresh[2]
            else:
                old = self._memory
                self._memory = (
                    torch.cat([old[0], fresh[0]], 2),
                    torch.cat([old[1], fresh[1]], 2),
                    torch.cat([old[2], fresh[2]], 2),
                )
        self._open = (keys[:, :, end:], values[:, :, end:])
