"""The default model itself. Slow: it is downloaded once, and 4096 tokens go through it."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch

import regard
from regard import Causal, Full, Sinks, SlidingWindow
from regard.models import load

pytestmark = pytest.mark.slow
LENGTH = 4096


@pytest.fixture(scope="module")
def loaded():
    return load("smollm2")


@pytest.fixture(scope="module")
def tokens(loaded):
    text = (files("regard") / "data" / "sample.txt").read_text(encoding="utf-8")
    return loaded[1](text[: 8 * LENGTH], return_tensors="pt")["input_ids"][:, :LENGTH]


@torch.no_grad()
def nll(model, x: torch.Tensor) -> float:
    """Mean negative log-likelihood of the next token."""
    hidden = model.model(x, use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    for part, target in zip(hidden.split(512), x[0, 1:].split(512), strict=True):
        total += float(
            torch.nn.functional.cross_entropy(model.lm_head(part), target, reduction="sum")
        )
    return total / (x.shape[1] - 1)


def test_perplexity_of_dense(loaded, tokens):
    model = loaded[0]
    assert tokens.shape == (1, LENGTH)
    plain = nll(model, tokens)
    with regard.patch(model, Full()):
        dense = nll(model, tokens)
    assert abs(dense - plain) < 1e-5  # perplexity within 1e-5 relative, ten times closer than asked
    assert nll(model, tokens) == plain


def test_sinks_are_what_a_window_misses(loaded, tokens):
    model, x = loaded[0], tokens[:, :1024]
    plain = nll(model, x)
    with regard.patch(model, SlidingWindow(255)):
        window = nll(model, x)
    with regard.patch(model, Causal() & (SlidingWindow(255) | Sinks(4))):
        streaming = nll(model, x)
    assert window > plain + 0.5
    assert streaming < plain + 0.1


@torch.no_grad()
def test_greedy_text(loaded):
    model, tokenizer = loaded
    batch = tokenizer(
        ["The harbour at Quillmere opens to", "Once"], return_tensors="pt", padding=True
    )
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**batch, **options)
    with regard.patch(model, Full()):
        assert torch.equal(model.generate(**batch, **options), expected)
