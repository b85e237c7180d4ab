"""Decoding with routing attention: the best tokens of each cluster so far, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.attend import attend
from regard.core.call import compute_dtype
from regard.core.data_masks import Keys
from regard.core.merge import merge

from .routing import SCATTER_EPS, default_scale, default_self_score, prepare
from .routing_kmeans import check_form, cluster_scores


class RoutingCache:
    """The decoding rule of the Routing Transformer: clusters select among what has been read.

    `cache.attend(q, k, v)` appends tokens one after the other. The output of each is that of
    `routing_attention(..., causal=True)` over the text so far (with `window` at most its length), last
    row: the official code selects anew at every step with the future at infinite distance. Since a
    token that leaves a cluster's best never returns, only those are held: `C * w` keys and values,
    however long the text. A step costs `O(C (w + D))` for the routing and `O(w D)` for each cluster
    that the new token is in. No gradients, no padding.

    Args:
        means: centroids `(H, C, D)`.
        window: `w`, tokens of a cluster.
        share_qk, form, scale, self_score, eps: as for :func:`~regard.sparse.routing.routing_attention`.
    """

    def __init__(
        self,
        means: Tensor,
        window: int,
        *,
        share_qk: bool = True,
        form: str = "official",
        scale: float | None = None,
        self_score: float | None = None,
        eps: float | None = None,
    ) -> None:
        check_form("RoutingCache", form)
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"RoutingCache: window must be an integer >= 1, got {window!r}")
        if self_score is not None and not share_qk:
            raise ValueError("RoutingCache: self_score needs share_qk, expected None without it")
        self.means, self.window, self.share_qk, self.form = means, window, share_qk, form
        self.scale = default_scale(form, means.shape[2]) if scale is None else scale
        self.self_score = default_self_score(form, share_qk) if self_score is None else self_score
        self.eps = SCATTER_EPS[form] if eps is None else eps
        self.length = 0
        self._keys: _Best | None = None
        self._queries: _Best | None = None
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @torch.no_grad()
    def attend(self, q: Tensor, k: Tensor | None, v: Tensor) -> Tensor:
        """Append tokens and attend from each.

        Args:
            q: `(B, H, n, D)`.
            k: `(B, Hkv, n, D)`; with `share_qk` it is not read and may be `None`.
            v: `(B, Hkv, n, Dv)`.

        Returns:
            `(B, H, n, Dv)`.
        """
        keys = q if k is None or self.share_qk else k
        if k is None and not self.share_qk:
            raise ValueError("RoutingCache: k is None, expected keys where share_qk is False")
        if keys.shape[2] != q.shape[2] or v.shape[2] != q.shape[2]:
            raise ValueError(
                f"RoutingCache: q has {q.shape[2]} tokens, k {keys.shape[2]} and v {v.shape[2]}; "
                "expected those of the same tokens"
            )
        ready = prepare(q, k, self.share_qk, self.form)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        near_q, near_k = (cluster_scores(x, self.means) for x in (ready.near_q, ready.near_k))
        out = v.new_zeros(*q.shape[:3], v.shape[-1], dtype=compute_dtype(q.dtype))
        for at in range(q.shape[2]):
            self._append(near_q[:, :, at], near_k[:, :, at], ready.k[:, :, at], v[:, :, at])
            out[:, :, at] = self._read(ready.q[:, :, at], v[:, :, at])
        return out.to(q.dtype)

    def _append(self, near_q: Tensor, near_k: Tensor, k: Tensor, v: Tensor) -> None:
        """One token: closeness to the centroids `(B, H, C)`, key and value `(B, H, D)`."""
        if self._keys is None:
            self._keys = _Best(near_k, self.window)
            self._queries = self._keys if self.share_qk else _Best(near_q, self.window)
            shape = (*near_k.shape, self.window)
            self._k, self._v = (x.new_zeros(*shape, x.shape[-1]) for x in (k, v))
        assert self._queries is not None and self._k is not None and self._v is not None
        if near_k.shape != self._keys.entered.shape:
            raise ValueError(
                f"RoutingCache: a token came for {tuple(near_k.shape[:2])} sequences and heads, the "
                f"cache has {tuple(self._keys.entered.shape[:2])}"
            )
        self._keys.offer(near_k, self.length)
        if not self.share_qk:
            self._queries.offer(near_q, self.length)
        at = self._keys.entered.nonzero(as_tuple=True)
        slot = self._keys.slot[at]
        self._k.index_put_((*at, slot), k[at[:2]])
        self._v.index_put_((*at, slot), v[at[:2]])
        self.length += 1

    def _read(self, q: Tensor, v: Tensor) -> Tensor:
        """Output `(B, H, Dv)` of the token that was appended last."""
        assert self._keys is not None and self._queries is not None
        assert self._k is not None and self._v is not None
        at = self._queries.entered.nonzero(as_tuple=True)
        rows, keys, values = q[at[:2]][:, None, None], self._k[at][:, None], self._v[at][:, None]
        held = self._keys.worth[at] > -torch.inf
        if self.self_score is not None:
            held = held.scatter(-1, self._keys.slot[at][:, None], False)
        mask = None if bool(held.all()) else Keys(held)
        if self.self_score is None:
            found = attend(rows, keys, values, mask=mask, scale=self.scale)
        else:
            out, lse = attend(rows, keys, values, mask=mask, scale=self.scale, return_lse=True)
            own = v[at[:2]][:, None, None], torch.full_like(lse, self.self_score)
            found, _ = merge([(out, lse), own])
        b, h = q.shape[:2]
        total = v.new_zeros(b * h, v.shape[-1], dtype=compute_dtype(v.dtype))
        total.index_add_(0, at[0] * h + at[1], found[:, 0, 0].to(total.dtype))
        count = self._queries.entered.sum(-1).to(total.dtype)
        return total.view(b, h, -1) / (count + self.eps)[..., None]


class _Best:
    """The best tokens of each cluster, of equals the earlier.

    Attributes:
        worth: their scores `(B, H, C, w)`, -inf where there is none yet.
        entered: whether the last token is among them, `(B, H, C)`.
        slot: where it is, or would be.
    """

    def __init__(self, like: Tensor, window: int) -> None:
        self.worth = like.new_full((*like.shape, window), -torch.inf)
        self.born = torch.full(self.worth.shape, -1, dtype=torch.int64, device=like.device)
        self.entered = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        self.slot = self.entered.to(torch.int64)

    def offer(self, worth: Tensor, time: int) -> None:
        """Let a token, worth `(B, H, C)`, take the place of the latest of the worst."""
        low = self.worth.amin(-1)
        latest = torch.where(self.worth == low[..., None], self.born, -2).argmax(-1)
        self.entered, self.slot = worth > low, latest
        at = self.entered.nonzero(as_tuple=True)
        place = (*at, latest[at])
        self.worth.index_put_(place, worth[at])
        self.born.index_put_(place, torch.tensor(time, device=worth.device))
