"""How many matrices to multiply at once."""

from __future__ import annotations

import torch


def balanced(room: int) -> int:
    """At most ``room`` (at least 1) matrices, so that a batched product keeps all threads busy.

    A CPU gives each thread whole matrices: three on two threads take as long as four (measured).
    """
    threads = torch.get_num_threads()
    return max(1, room if room < threads else room // threads * threads)
