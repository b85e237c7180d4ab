"""Which part of a text plays which part of a prompt when ``regard compare`` runs a steering method.

The rule is ours; no paper has one for a text without an image:

- in a text whose perplexity is measured the first half is the prompt and the second half the answer,
  teacher-forced;
- a haystack and the prompt of the tasks are a prompt as a whole; the question put to them and its
  answer are generated;
- of a prompt the first three quarters are the ``image``, the rest is the ``text``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models import Method, Spans, patch
from ..models.spans import GENERATED
from .quality import prefill

RULE = (
    "the first half of the text is the prompt, the second half the answer; of a prompt the first "
    "three quarters are the image, the rest is the text"
)
# Tokens of the trial run: enough for any method's parts, over at once.
_TRIAL = 64


def of_prompt(length: int) -> Spans:
    """Parts of a prompt of this length, after which everything is generated."""
    image = 3 * length // 4
    return Spans.of(length, image=(0, image), text=(image, length))


def of_text(length: int) -> Spans:
    """Parts of a text of this length, the second half of which is the answer."""
    return of_prompt(length // 2)


def told(spans: Spans, length: int) -> dict[str, list[list[int]]]:
    """The spans of ``length`` tokens as plain data: name -> half-open ranges."""
    assert spans.length is not None
    named = {name: [list(part) for part in ranges] for name, ranges in spans.ranges.items()}
    return {**named, GENERATED: [[spans.length, length]]}


def check_sites(who: str, method: Method) -> None:
    """Refuse what perplexity cannot be measured of.

    Raises:
        ValueError: the method edits the output head's logits: they are made here in chunks, outside of
            the decoder's pass, where the engine cannot tell which row is which.
    """
    if any(edit.site == "lm_logits" and not edit.observes for edit in method.edits()):
        raise ValueError(
            f"compare: {who} edits the logits of the output head (lm_logits), which are made in "
            "chunks here, so that its rows cannot be told apart; measure it with regard.patch around "
            "the model's own forward"
        )


@torch.no_grad()
def try_out(model: Any, who: str, method: Method, ids: Tensor) -> None:
    """Run a method on a few tokens and a decoding step, so that one that needs other parts, another
    model or a picture is refused before anything is measured.

    Raises:
        ValueError: which method, and why.
    """
    ids = ids[:, :_TRIAL].to(model.device)
    try:
        with patch(model, method, spans=of_text(ids.shape[1])):
            _, cache = prefill(model, ids)
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    except ValueError as error:
        raise ValueError(
            f"compare: {who} cannot run on {type(model).__name__} with the spans image and text: "
            f"{error}"
        ) from error


@torch.no_grad()
def looks_ahead(model: Any, method: Method, ids: Tensor, states: Tensor) -> bool:
    """Whether rows of the answer depend on tokens behind them.

    The last quarter of the text is turned round and the text read again: rows before it must come out
    as they were. Where they do not, the text's perplexity is not that of a prediction.

    Args:
        model: without the method.
        method: a steering method.
        ids: the text, ``(1, N)``.
        states: the last hidden states ``(1, N, C)`` with the method on.
    """
    n = ids.shape[1]
    start, stop = n // 2 - 1, n - n // 4
    turned = torch.cat([ids[:, :stop], ids[:, stop:].flip(1)], 1)
    with patch(model, method, spans=of_text(n)):
        again, _ = prefill(model, turned)
    before, after = (x[:, start:stop].float() for x in (states, again))
    # Sums over masked keys may be taken in another order; a changed choice moves far more.
    return float((after - before).norm() / before.norm()) > 1e-4
