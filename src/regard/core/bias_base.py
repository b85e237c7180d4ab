"""What every bias is: the base class, and helpers for index tensors that biases share."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Index: TypeAlias = Tensor | int


class Bias:
    """An additive score term. Subclasses define :meth:`scores` and list their :meth:`tensors`.

    Positions are absolute: with `n` queries and `m` keys, query row `r` is position `r + m - n`.
    """

    @property
    def heads(self) -> int | None:
        """How many query heads this bias is made for; None when it is the same for all."""
        return None

    @property
    def batch(self) -> int | None:
        """How many batch entries this bias is made for; None when it is the same for all."""
        return None

    def scores(self, i: Tensor, j: Tensor, h: Index = 0, b: Index = 0) -> Tensor:
        """The term for query positions `i` and key positions `j`, not multiplied by `scale`.

        Args:
            i, j: int64 tensors of absolute positions, broadcastable against each other.
            h, b: query head and batch index, tensors or ints that broadcast along.

        Returns:
            A float tensor of the broadcast shape, differentiable in :meth:`tensors`.
        """
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that :meth:`scores` is differentiable in; none by default."""
        return ()

    def accumulate(
        self,
        buffers: tuple[Tensor | None, ...],
        grad: Tensor,
        i: Tensor,
        j: Tensor,
        h: Index = 0,
        b: Index = 0,
    ) -> None:
        """Add the gradient of `(scores(i, j, h, b) * grad).sum()` to `buffers`, in place.

        Args:
            buffers: one tensor of the same shape for each of :meth:`tensors`, or None where that
                tensor's gradient is not wanted.
            grad: tensor of the broadcast shape of the indices.
        """
        own = self.tensors()
        wanted = [p for p, t in enumerate(own) if t.requires_grad and buffers[p] is not None]
        if not wanted:
            return
        with torch.enable_grad():
            scores = self.scores(i, j, h, b)
        found = torch.autograd.grad(
            scores, [own[p] for p in wanted], grad.to(scores.dtype), allow_unused=True
        )
        for p, one in zip(wanted, found, strict=True):
            buffer = buffers[p]
            if one is not None and buffer is not None:
                buffer += one

    def factors(self, n: int, m: int) -> tuple[Tensor, Tensor] | None:
        """Exact factors for `n` queries at the end of `m` keys, or None if there are none.

        Returns:
            `phi_q` `(1 or B, 1 or H, n, R)` and `phi_k` `(1 or B, 1 or H, m, R)`: the bias is
            `phi_q @ phi_k^T`.
        """
        return None

    def check(self, n: int, m: int, heads: int | None = None, batch: int | None = None) -> None:
        """Raise ValueError unless the bias fits `n` queries, `m` keys and these heads and batch."""
        for what, own, given in (("heads", self.heads, heads), ("batch", self.batch, batch)):
            if own is not None and given is not None and own != given:
                raise ValueError(
                    f"{type(self).__name__}: made for {what}={own}, but the call has {given}"
                )


def axis_width(t: Tensor, axis: int) -> int | None:
    """Size of the axis that stands `axis` from the end; None where it is missing or shared."""
    return t.shape[-axis] if t.dim() >= axis and t.shape[-axis] > 1 else None


def joint_shape(*index: Index) -> torch.Size:
    """The shape that the indices broadcast to."""
    shapes = [x.shape for x in index if isinstance(x, Tensor)]
    return torch.Size(torch.broadcast_shapes(*shapes))


def per_plane(x: Index) -> bool:
    """Whether an index is constant over the last two axes, those of the positions."""
    return not isinstance(x, Tensor) or all(size == 1 for size in x.shape[-2:])


def per_plane_index(x: Index) -> Index:
    """A per-plane index without the last two axes."""
    if not isinstance(x, Tensor):
        return x
    return x.reshape(x.shape[:-2]) if x.dim() >= 2 else x.reshape(())


def stretch(x: Tensor, axis: int) -> slice | None:
    """The slice that `x` runs through along `axis`, or None if it is not one (or on a GPU, where
    looking would wait for it)."""
    if x.is_cuda or x.numel() == 0 or x.dim() < -axis or x.shape[axis] != x.numel():
        return None
    flat = x.reshape(-1)
    first = int(flat[0])
    if first < 0 or not torch.equal(flat, torch.arange(first, first + flat.numel())):
        return None
    return slice(first, first + flat.numel())
