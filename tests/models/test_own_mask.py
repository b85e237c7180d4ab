"""What transformers means by a mask, against the dense mask that transformers makes of it."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as hf

from regard.core.masks import Predicate
from regard.models.own_mask import own_mask

B, N = 3, 12
PADDED = torch.arange(20)[None] >= torch.tensor([0, 2, 5])[:, None]
GROUPS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1, 2, 2, -1]]).expand(B, -1)
PACKED = torch.cat([torch.arange(n) for n in (5, 3, 4)]).expand(B, -1)
CAUSAL, WINDOW = hf.causal_mask_function, hf.sliding_window_causal_mask_function(4)
CHUNKED = hf.chunked_causal_mask_function(3, torch.tensor([0, 2, 5]))


def odd_keys(b, h, q, kv):
    """A user's function that can be broadcast."""
    return kv % 2 == 1


def one_index(b, h, q, kv):
    """A user's function for single indices only: broadcast, it would mean something else."""
    row = torch.stack([q, kv])
    return row.sum() % 3 == 0


def packed(function):
    ids = hf.find_packed_sequence_indices(PACKED)
    return hf.packed_sequence_compatibility_function(function, PACKED, ids)


CASES = {
    "causal": {"mask_function": CAUSAL},
    "window": {"mask_function": WINDOW},
    "bidirectional": {"mask_function": hf.bidirectional_mask_function},
    "bidirectional window": {"mask_function": hf.sliding_window_bidirectional_mask_function(3)},
    "chunked": {"mask_function": CHUNKED},
    "chunked, padded": {"mask_function": CHUNKED, "attention_mask": PADDED[:, :N]},
    "blockwise": {"mask_function": hf.or_masks(CAUSAL, hf.blockwise_overlay(GROUPS))},
    "packed": {"mask_function": packed(CAUSAL)},
    "packed window": {"mask_function": packed(WINDOW)},
    "packed chunks": {"mask_function": packed(CHUNKED)},
    "padded": {"mask_function": CAUSAL, "attention_mask": PADDED[:, :N]},
    "padded window": {"mask_function": WINDOW, "attention_mask": PADDED[:, :N]},
    "a user's and": {"mask_function": hf.and_masks(CAUSAL, odd_keys), "use_vmap": True},
    "a user's or": {"mask_function": hf.or_masks(WINDOW, odd_keys), "use_vmap": True},
    "single indices": {"mask_function": hf.and_masks(CAUSAL, one_index), "use_vmap": True},
    "decoding": {"q_length": 1, "kv_length": 9, "q_offset": 8, "mask_function": CAUSAL},
    "decoding, padded": {
        "q_length": 1,
        "kv_length": 9,
        "q_offset": 8,
        "mask_function": WINDOW,
        "attention_mask": PADDED[:, :9],
    },
    "a piece": {"q_length": 4, "kv_length": 12, "q_offset": 8, "mask_function": WINDOW},
    "dropped keys": {
        "q_length": 2,
        "kv_length": 5,
        "q_offset": 10,
        "kv_offset": 7,
        "mask_function": WINDOW,
        "attention_mask": PADDED[:, :12],
    },
    "dropped keys, user's": {
        "q_length": 2,
        "kv_length": 5,
        "q_offset": 10,
        "kv_offset": 7,
        "mask_function": hf.and_masks(WINDOW, odd_keys),
        "use_vmap": True,
    },
    "static cache": {"q_length": 3, "kv_length": 20, "q_offset": 6, "mask_function": CAUSAL},
    "static cache, padded": {
        "q_length": 1,
        "kv_length": 20,
        "q_offset": 6,
        "mask_function": CAUSAL,
        "attention_mask": PADDED[:, :7],
    },
    "to another sequence": {
        "q_length": 4,
        "kv_length": 9,
        "mask_function": hf.bidirectional_mask_function,
        "attention_mask": PADDED[:, :9],
    },
}
EVALUATED = {"packed chunks", "a user's and", "a user's or", "single indices"} | {
    "dropped keys, user's"
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_mask(name: str):
    arguments = {"batch_size": B, "q_length": N, "kv_length": N, "q_offset": 0, **CASES[name]}
    expected = hf.sdpa_mask(allow_is_causal_skip=False, **arguments)
    own = own_mask(arguments)
    mask = own.padded(own.pattern)
    n = arguments["q_length"]
    got = mask.dense(n, own.keys).expand(B, 1, n, own.keys)
    assert torch.equal(got, expected[..., : own.keys])
    assert not expected[..., own.keys :].any()  # what is cut off could not be seen
    assert isinstance(own.pattern, Predicate) == (name in EVALUATED)
    # the faster form that backends use says the same
    layout = mask.layout(n, own.keys, 4)
    assert torch.equal(layout.dense().expand(B, 1, n, own.keys), got)


def test_starts_of_sequences():
    base = {"batch_size": B, "q_length": N, "kv_length": N, "mask_function": CAUSAL}
    assert own_mask(base).start is None
    assert own_mask({**base, "attention_mask": PADDED[:, :N]}).start.tolist() == [0, 2, 5]
    right = own_mask({**base, "attention_mask": PADDED[:, :N].flip(1)})
    assert right.start is None and right.valid is not None
    starts = own_mask({**base, "mask_function": packed(CAUSAL)}).start
    assert starts[0].tolist() == [0] * 5 + [5] * 3 + [8] * 4
