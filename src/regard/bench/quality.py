"""How well a language model predicts: perplexity, agreement, needles. In chunks, never all logits."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import fork

# Tokens whose logits exist at once: 50 MB for a vocabulary of 50,000.
_CHUNK = 256


def prefill(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """Last hidden states ``(B, N, C)`` and the KV cache of a prompt, without its logits."""
    with torch.no_grad():
        out = model.base_model(input_ids=ids.to(model.device), use_cache=True)
    return out.last_hidden_state, out.past_key_values


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Next-token logits of hidden states, float32."""
    with torch.no_grad():
        out = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return out if cap is None else cap * torch.tanh(out / cap)


@dataclass(frozen=True)
class Prediction:
    """What a model predicts on a text.

    Attributes:
        nll: negative log-likelihood of each next token, nats, ``(N - 1,)``.
        best: most likely next token at each position, ``(N,)``.
    """

    nll: Tensor
    best: Tensor

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood."""
        return math.exp(self.nll.double().mean().item())

    def since(self, start: int) -> Prediction:
        """The same from the row ``start`` on, which predicts the token behind it."""
        return Prediction(self.nll[start:], self.best[start:])


def predict(model: Any, hidden: Tensor, ids: Tensor) -> Prediction:
    """Score a text whose hidden states are known."""
    nll, best = [], []
    for start in range(0, ids.shape[1], _CHUNK):
        scores = logits(model, hidden[:, start : start + _CHUNK])[0]
        best.append(scores.argmax(-1).cpu())
        targets = ids[0, start + 1 : start + 1 + scores.shape[0]].to(scores.device)
        picked = scores[: len(targets)].gather(1, targets[:, None])[:, 0]
        nll.append((scores[: len(targets)].logsumexp(-1) - picked).cpu())
    return Prediction(torch.cat(nll), torch.cat(best))


@dataclass(frozen=True)
class Needle:
    """A fact in the haystack: at ``depth`` stands ``fact``; ``question`` asks for ``answer``."""

    depth: float
    fact: str
    question: str
    answer: str


_PLACES = ("Veldrin", "Oskary", "Tamberlow", "Quillmere", "Harstad", "Brindle", "Calloway", "Esper")


def needles(depths: tuple[float, ...], seed: int = 0) -> list[Needle]:
    """One fact a depth, each about another place, numbers drawn with the seed."""
    if len(depths) > len(_PLACES):
        raise ValueError(f"needles: {len(depths)} depths, at most {len(_PLACES)} are possible")
    rng = random.Random(seed)
    places = rng.sample(_PLACES, len(depths))
    found = []
    for depth, place in zip(depths, places, strict=True):
        number = str(rng.randint(10000, 99999))
        words = f"The secret number of {place} is"
        found.append(Needle(depth, f" {words} {number}.", f"\n\n{words}", f" {number}"))
    return found


def haystack(tokenizer: Any, text: str, facts: Sequence[tuple[float, str]], length: int) -> Tensor:
    """At most ``length`` tokens of text with facts between its sentences, ``(1, <= length)``.

    Args:
        facts: (depth as a share of the length, words), in any order.

    Raises:
        ValueError: the facts leave no room for the text.
    """

    def encode(x: str) -> list[int]:
        return list(tokenizer(x, add_special_tokens=False)["input_ids"])

    waiting = [(depth, encode(words)) for depth, words in sorted(facts, key=lambda fact: fact[0])]
    if length - sum(len(fact) for _, fact in waiting) < 4 * len(waiting):
        raise ValueError(f"needles: {length} tokens are too few for {len(waiting)} needles")
    ends = [match.end() for match in re.finditer(r"[.;!?](?=\s)", text[: 16 * length])]
    pieces = [text[a:z] for a, z in zip([0, *ends], ends, strict=False)]
    out: list[int] = []
    for piece in pieces:
        while waiting and len(out) >= waiting[0][0] * length:
            out += waiting.pop(0)[1]
        ids = encode(piece)
        if len(out) + len(ids) + sum(len(fact) for _, fact in waiting) > length:
            break
        out += ids
    for _, fact in waiting:
        out += fact
    return torch.tensor(out, dtype=torch.int64)[None]


def ask(model: Any, tokenizer: Any, cache: Any, question: str, answer: str) -> bool:
    """Whether the model, greedily, answers a question exactly after the prompt in ``cache``.

    The cache is left as it was.
    """
    ids = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
    cache = fork(model, cache)
    for token in wanted:
        with torch.no_grad():
            out = model.base_model(
                input_ids=ids.to(model.device), past_key_values=cache, use_cache=True
            )
        best = int(logits(model, out.last_hidden_state[:, -1:])[0, -1].argmax())
        if best != token:
            return False
        ids = torch.tensor([[token]])
    return True
