"""What training with landmarks needs beside the attention (arXiv 2305.16300, section 3.2 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["insert_landmarks", "landmark_positions", "landmark_targets"]


def insert_landmarks(ids: Tensor, every: int, landmark: int) -> Tensor:
    """Tokens with a landmark behind each `every` of them.

    Args:
        ids: integers `(..., N)`.
        every: `f`, tokens a block, the landmark not counted (50 in the paper's language models).
        landmark: id of the landmark token.

    Returns:
        `(..., N + N // every)`; a last block of fewer tokens is not closed.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"insert_landmarks: every must be an integer >= 1, got {every!r}")
    n = ids.shape[-1]
    whole = n // every * every
    blocks = ids[..., :whole].unflatten(-1, (n // every, every))
    closed = torch.nn.functional.pad(blocks, (0, 1), value=landmark).flatten(-2)
    return torch.cat([closed, ids[..., whole:]], -1)


def landmark_targets(ids: Tensor, landmark: int, ignore: int = -100) -> Tensor:
    """What each position should predict: the next token that is no landmark; landmarks predict nothing.

    As in the authors' training: the last token of a block predicts the first of the next one, and a
    landmark carries no loss. Landmarks that follow each other are skipped together.

    Args:
        ids: integers `(..., N)`, landmarks inserted.
        ignore: target of landmarks and of the last token, for `cross_entropy(ignore_index=...)`.

    Returns:
        `(..., N)`.
    """
    n = ids.shape[-1]
    regular = ids != landmark
    place = torch.where(regular, torch.arange(n, device=ids.device), n)
    # The nearest regular place at or behind each position, then that of the position behind it.
    following = place.flip(-1).cummin(-1).values.flip(-1) if n else place
    following = torch.cat([following[..., 1:], torch.full_like(following[..., :1], n)], -1)
    targets = torch.cat([ids, torch.full_like(ids[..., :1], ignore)], -1).gather(-1, following)
    return targets.masked_fill(~regular, ignore)


def landmark_positions(
    is_landmark: Tensor, jump: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Positions that jump ahead behind each landmark, by `0 .. jump - 1` at random.

    The paper's option for training short and reading long: the model meets large distances between
    blocks and true ones inside.

    Args:
        is_landmark: bool `(B, N)`.
        jump: exclusive bound of a jump; 0 and 1 give `0, 1, 2, ...`.
        generator: source of randomness.

    Returns:
        int64 `(B, N)`.
    """
    if is_landmark.dim() != 2 or is_landmark.dtype != torch.bool or jump < 0:
        raise ValueError(
            f"landmark_positions: expected a bool (B, N) and jump >= 0, got {is_landmark.dtype} "
            f"{tuple(is_landmark.shape)} and {jump}"
        )
    plain = torch.arange(is_landmark.shape[1], device=is_landmark.device).expand(is_landmark.shape)
    if jump < 2:
        return plain.clone()
    drawn = torch.randint(jump, is_landmark.shape, generator=generator).to(is_landmark.device)
    total = (drawn * is_landmark).cumsum(-1)
    return plain + torch.nn.functional.pad(total[:, :-1], (1, 0))
