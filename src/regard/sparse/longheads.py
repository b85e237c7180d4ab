"""LongHeads: each head attends to a few chunks of its own, placed inside the trained length.

Lu et al., "LongHeads: Multi-Head Attention is Secretly a Long Context Processor", arXiv 2402.10685,
section 3. Training-free, for pretrained models with rotary positions. With chunks of `W` tokens and
`n = length / W`:

    feature of chunk c:   o_c = mean_t Attn(q_t, K_c, V_c)  (not causal, rotary position t mod W)
                          f_c = Attn(o_c, K_c, K_c)
    score for query t:    q0_t . f_c                        (query before the rotary embedding)
    chunks of query t:    the first, the last complete one, the best n - 3 between them, and the running
                          one as far as it goes; keys in order at positions 0, 1, 2, ..., the query at
                          the last of them

so that no query sees more than `length` keys or a distance beyond it. Queries before `start` attend to
everything before them, as the model always did.

The authors' prefill drops the token itself (`exclude_self`), its decoding includes it; here both
include it unless asked. Checked against LuLuLuyi/LongHeads, `modeling_longheads/modeling_llama.py`,
which in decoding selects from one row earlier, `t = start - 1`: here `start` tokens are still dense.

Further files: `longheads_chunks` (the algorithm), `longheads_cache` (features as chunks fill up, a
cache, the function and the layer). Here: the method for :func:`regard.patch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regard.card import Card
from regard.core.masks import Causal
from regard.models.calls import AttentionCall
from regard.models.method import Inner, Method
from regard.models.plain_call import beyond_causal
from regard.models.rotary import Rotary

from .longheads_cache import ChunkFeatures
from .longheads_chunks import ChunkSelect, attend_chunks

CARD = Card(
    key="longheads",
    title="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
    arxiv="2402.10685",
    family="sparse",
    entry="regard.sparse.longheads:LongHeads",
    definition="tests/sparse/test_longheads_chunks.py::test_is_the_papers_algorithm",
    oracle="python -m tests.golden tests/golden/data/longheads.npz",
    claim="python -m benchmarks.longheads --model",
    cost="python -m benchmarks.longheads --only growth",
    note="Decoding is followed where the authors' prefill differs from it (exclude_self).",
)


@dataclass(frozen=True)
class LongHeads(Method):
    """Each head of each token reads a few chunks, placed inside the trained length (arXiv 2402.10685).

        with regard.patch(model, LongHeads(window=256, length=4096, start=4096)):
            model.generate(ids_longer_than_the_model_was_trained_for)

    Prefill and decoding; the KV cache stays the model's own, and what is kept besides are one feature a
    chunk and the running chunk. Left padding and batches are served. Patch before the cache is filled.
    Beam search reorders a cache without telling, so the features of generated chunks would belong to
    other beams: use sampling or greedy decoding.

    Args:
        window: tokens a chunk.
        length: tokens that a query reads at most; at most the trained length.
        start: queries at positions before it read everything, as without the method.
        remap: place the chunks one behind the other; `False` leaves them at their true distances, which
            a model does not know beyond its trained length.
        exclude_self: in prefill, queries from `start` on do not see themselves, as in the authors' code.

    Raises:
        ValueError: sizes that do not fit, as :class:`~regard.sparse.longheads_chunks.ChunkSelect` says.
            In a model: layers that are not causal over the whole cache, packed sequences, positions
            with gaps, and beyond `start` anything but a plain softmax.
    """

    window: int = 256
    length: int = 4096
    start: int = 4096
    remap: bool = True
    exclude_self: bool = False

    def __post_init__(self) -> None:
        self.select  # noqa: B018  (checks the sizes)

    @property
    def select(self) -> ChunkSelect:
        """The sizes."""
        return ChunkSelect(self.window, self.length, self.start, self.remap)

    def attend(self, call: AttentionCall, inner: Inner) -> Tensor:
        """Keep the features up to date, and beyond `start` attend to the chosen chunks."""
        self._check(call)
        rotary = call.rotary
        begins = [0] if call.own.start is None else call.own.start.tolist()
        states = call.cache_store.setdefault(call.layer, [None] * len(begins))
        entries = []
        for at, begin in enumerate(begins):
            batch = slice(None) if call.own.start is None else slice(at, at + 1)
            if states[at] is None:
                states[at] = ChunkFeatures(self.window, call.scale)
            entries.append(_Entry(call, rotary, batch, int(begin), states[at]))
        queries = [entry.update() for entry in entries]
        if max(call.m - entry.begin for entry in entries) <= self.start:
            return inner(call)
        what = beyond_causal(call)
        if what is not None:
            raise ValueError(f"LongHeads: layer {call.layer} has {what}, expected plain softmax")
        out = call.v.new_zeros(*call.q.shape[:3], call.v.shape[-1])
        for entry, q in zip(entries, queries, strict=True):
            out[entry.batch, :, call.n - q.shape[2] :] = attend_chunks(
                q,
                call.k[entry.batch, :, entry.begin :],
                call.v[entry.batch, :, entry.begin :],
                entry.features,
                self.select,
                entry.rotate,
                exclude_self=self.exclude_self and not call.decoding,
                scale=call.scale,
            )
        return out

    def _check(self, call: AttentionCall) -> None:
        own = call.own
        if (
            not isinstance(own.pattern, Causal)
            or own.offset
            or (own.start is not None and own.start.dim() > 1)
        ):
            raise ValueError(
                f"LongHeads: layer {call.layer} attends under {own.pattern!r} from column {own.offset} "
                "on, expected causal attention over the whole sequence; choose other layers"
            )


class _Entry:
    """The sequences of a call that begin in one column, seen from their first token."""

    def __init__(
        self,
        call: AttentionCall,
        rotary: Rotary,
        batch: slice,
        begin: int,
        state: ChunkFeatures,
    ) -> None:
        self.call, self.rotary, self.batch, self.begin, self.state = (
            call,
            rotary,
            batch,
            begin,
            state,
        )
        positions = rotary.key_positions
        self.positions = (positions[batch] if positions.shape[0] > 1 else positions)[:, begin:]
        if bool((self.positions.diff(dim=-1) != 1).any()):
            raise ValueError(
                "LongHeads: the positions of the keys have gaps, expected consecutive ones"
            )

    @property
    def features(self) -> Tensor:
        assert self.state.features is not None
        return self.state.features

    def update(self) -> Tensor:
        """Unrotated queries of the call's real tokens, `(B, H, N', D)`, which the state now knows."""
        call, begin = self.call, self.begin
        seen = call.m - call.n - begin
        if self.state.length != max(0, seen):
            raise ValueError(
                f"LongHeads: {self.state.length} of the {seen} tokens in the cache were seen; enter "
                "the patch before the KV cache is filled"
            )
        new = min(call.n, call.m - begin)
        at = self.positions[:, self.positions.shape[1] - new :]
        q, k = (
            self.rotary.unrotate(x[self.batch, :, x.shape[2] - new :], at) for x in (call.q, call.k)
        )
        v = call.v[self.batch, :, call.m - new :]
        self.state.update(q, k, v, partial(self._turn, first=torch.zeros_like(at[:, :1])))
        return q

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` `(B, H, L, D)` at positions counted from the sequence's first token."""
        return self._turn(x, positions, first=self.positions[:, :1])

    def _turn(self, x: Tensor, positions: Tensor, first: Tensor) -> Tensor:
        if positions.dim() == 1:
            return self.rotary.rotate(x, positions + first)
        # The model's embedding knows positions of batch entries: each head becomes one. The angles are
        # made once a position, not once a copy of a query.
        at = (positions + first[:, :, None]).expand(x.shape[:3]).flatten(0, 1)
        low, high = int(at.min()), int(at.max())
        known = torch.arange(low, high + 1, device=at.device)[None]
        cos, sin = (table[0][at - low] for table in self.rotary.angles(x, known))
        flat = x.flatten(0, 1)[:, None]
        return self.rotary.apply(flat, flat, cos, sin)[0][:, 0].unflatten(0, x.shape[:2])
