"""Masks patched into models, against eager attention with the dense mask written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard import Causal, Dilated, PerHead, Sinks, SlidingWindow
from regard.models import Edit, Method

from .tiny import KINDS, WINDOW, ids, left_padding, make

STREAMING = Causal() & (SlidingWindow(5) | Sinks(2))
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def written_out(n: int) -> torch.Tensor:
    """The streaming mask from its definition: the last 6 keys and the first 2."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return (j <= i) & ((i - j <= 5) | (j < 2))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_streaming_equals_eager_with_a_dense_mask(kind: str):
    n = 23
    allowed = written_out(n)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    local = allowed & (i - j < WINDOW)
    model, x = make(kind, implementation="eager"), ids(2, n)
    full, sliding = additive(allowed)[None, None], additive(local)[None, None]
    if kind in ("qwen3", "gemma3"):
        given = {"full_attention": full, "sliding_attention": sliding}
    else:
        given = sliding if kind == "mistral" else full
    expected = model(x, attention_mask=given).logits
    with regard.patch(model, STREAMING):
        got = model(x).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert not torch.allclose(got, model(x).logits, atol=1e-3) or kind == "mistral"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_equals_one_pass(kind: str):
    model, x = make(kind), ids(2, 26)
    with regard.patch(model, STREAMING):
        whole = model(x).logits
        out = model(x[:, :10], use_cache=True)
        got = [out.logits]
        for part in x[:, 10:].split([1, 1, 5, 1, 8], 1):
            out = model(part, past_key_values=out.past_key_values, use_cache=True)
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), whole, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sequences_mean_the_same_wherever_padding_puts_them(kind: str):
    model, x, mask = make(kind), ids(3, 20), left_padding(3, 20)
    options = {"max_new_tokens": 6, "min_length": 26, "do_sample": False}
    with regard.patch(model, STREAMING):
        batch = model(x, attention_mask=mask).logits
        tokens = model.generate(x, attention_mask=mask, **options)
        for entry in range(3):
            start = int((mask[entry] == 0).sum())
            alone = x[entry : entry + 1, start:]
            torch.testing.assert_close(batch[entry, start:], model(alone).logits[0], **TOLERANCE)
            one = model.generate(alone, **{**options, "min_length": 26 - start})
            assert torch.equal(tokens[entry, start:], one[0])


@torch.no_grad()
def test_packed_sequences_have_sinks_of_their_own():
    model, x = make("llama"), ids(1, 31)
    lengths = (9, 15, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with regard.patch(model, STREAMING):
        got = model(x, position_ids=positions, use_cache=False).logits
        alone = [model(part).logits for part in x.split(lengths, 1)]
    torch.testing.assert_close(got, torch.cat(alone, 1), **TOLERANCE)


@torch.no_grad()
def test_one_mask_a_head_and_chosen_layers():
    n = 17
    masks = [SlidingWindow(2), Causal(), Dilated(4, 2), SlidingWindow(9)]
    model, x = make("llama", implementation="eager"), ids(2, n)
    dense = torch.stack([(m & Causal()).dense(n) for m in masks])
    expected = model(x, attention_mask=additive(dense)[None]).logits
    with regard.patch(model, PerHead(masks)):
        torch.testing.assert_close(model(x).logits, expected, **TOLERANCE)
    plain = model(x).logits
    with regard.patch(model, PerHead(masks), layers=[]):
        torch.testing.assert_close(model(x).logits, plain, **TOLERANCE)


class Largest(TorchDispatchMode):
    """The largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, held, 0)
        return out


@torch.no_grad()
def test_no_n_by_n_tensor():
    n = 1024
    changes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    model = make("llama", max_position_embeddings=n, num_hidden_layers=2, **changes)
    x, mask = ids(1, n), left_padding(1, n)
    with regard.patch(model, STREAMING), Largest() as one:
        model(x)
        model(x, attention_mask=mask)
    assert 0 < one.entries < n * n // 4
    model.set_attn_implementation("eager")
    with Largest() as dense:
        model(x)
    assert dense.entries >= n * n  # the measure sees what eager attention makes


class Sees(Method):
    """Adds causal edits at every kind of site."""

    def edits(self):
        def scale(x, site):
            return x * 1.5

        return [Edit(site, scale) for site in ("logits", "weights", "heads", "mlp", "resid")]


@pytest.mark.parametrize("method", [STREAMING, Sees()], ids=["mask", "edits"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_row_depends_on_the_future(kind: str, method):
    model, x = make(kind), ids(1, 22)
    with regard.patch(model, method):
        before = model(x).logits
        for at in (0, 7, 21):
            moved = x.clone()
            moved[0, at] = 1 + moved[0, at] % 60
            after = model(moved).logits
            assert torch.equal(after[:, :at], before[:, :at])
            assert not torch.allclose(after[:, at:], before[:, at:])
