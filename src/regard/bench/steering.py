"""``regard steer``: one method on one prompt, before and after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..models import SiteProbe, Spans, chat_spans, load, patch, watch
from ..models.method import Method
from ..models.progress import Progress
from .timing import machine

# Tokens of the next-token distribution that are told.
TOP = 8


def run(
    method: Method,
    prompt: str,
    *,
    name: str = "method",
    context: str | None = None,
    role: str = "image",
    model: str = "smollm2",
    tokens: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer a prompt as the model is, and steered.

    The prompt is one user turn of the model's chat template, the context in front of the question.
    Spans: the context is called ``role``, the question ``text``, everything else ``template``.

    Args:
        method: what steers.
        prompt: the question.
        name: the method's name.
        context: what the question is about; a text model sees it as a vision model sees an image.
        role: what methods call the context's span.
        model: a name for :func:`regard.models.load`.
        tokens: answer's length at most, greedy.
        progress: called with (words, steps done, steps in all).

    Returns:
        Plain data: ``before`` and ``after`` (``text``, ``top`` next tokens with probabilities,
        ``seconds`` a token), ``kl`` of the first next-token distribution in nats (after against
        before), ``mass`` of the last prompt row by span and layer (``None`` where the method
        computes attention in its own way), ``spans`` and what was asked.

    Raises:
        ValueError: an empty prompt, or the method does not fit the model or the spans.
    """
    if not prompt.strip():
        raise ValueError("steer: the prompt is empty")
    if tokens < 1:
        raise ValueError(f"steer: tokens must be >= 1, got {tokens}")
    say = progress or (lambda words, done, total: None)
    say(f"loading {model}", 0, 3)
    loaded, tokenizer = load(model)
    loaded.eval()
    method.check_model(loaded)
    ids, spans = parts(tokenizer, prompt, context, role)
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + tokens > limit:
        raise ValueError(
            f"steer: {ids.shape[1]} tokens of prompt and {tokens} of answer, but {model} has {limit} "
            "positions"
        )
    ids = ids.to(loaded.device)
    say("the model as it is", 1, 3)
    before = _answer(loaded, tokenizer, ids, spans, None, tokens)
    say(f"with {name}", 2, 3)
    after = _answer(loaded, tokenizer, ids, spans, method, tokens)
    say("done", 3, 3)
    first, second = (x.pop("log_p") for x in (before, after))
    mass = None
    if before["mass"] is not None and after["mass"] is not None:
        mass = {
            span: {"before": before["mass"][span], "after": after["mass"][span]}
            for span in before["mass"]
        }
    del before["mass"], after["mass"]
    return {
        "method": {"name": name, "settings": repr(method)},
        "model": model,
        "prompt": prompt,
        "context": context,
        "spans": {span: [list(part) for part in ranges] for span, ranges in spans.ranges.items()},
        "tokens": int(ids.shape[1]),
        "before": before,
        "after": after,
        "kl": float((second.exp() * (second - first)).sum()),
        "mass": mass,
        "machine": machine(),
    }


def parts(
    tokenizer: Any, prompt: str, context: str | None, role: str, who: str = "steer"
) -> tuple[Tensor, Spans]:
    """Token ids of the chat and its spans: ``role`` (the context), ``text`` and ``template``.

    A token that reaches over the border of context and question belongs to the question.

    Args:
        tokenizer: with a chat template.
        prompt: the question.
        context: what it is about, in front of it.
        role: what the context's span is called.
        who: the command that asks, which messages name.

    Raises:
        ValueError: the template changes the text.
    """
    body = prompt if context is None else f"{context}\n\n{prompt}"
    ids, turns = chat_spans(tokenizer, [{"role": "user", "content": body}])
    (first, last) = turns.ranges["user"][0]
    words = [tokenizer.decode(ids[0, :at]) for at in range(first, last + 1)]
    start = words[-1].rfind(body)
    if start < 0:
        raise ValueError(
            f"{who}: the chat template changes the prompt's text; spans cannot be found"
        )
    ends = [len(word) for word in words]

    def place(sign: int) -> int:
        """The first token that ends beyond a sign of the text."""
        return first + next(at for at, end in enumerate(ends[1:]) if end > sign)

    question = place(start + len(body) - len(prompt))
    stop = place(start + len(body) - 1) + 1
    named: dict[str, Any] = {"text": (question, stop)}
    if context is not None:
        named[role] = (place(start), question)
    taken = min(a for a, _ in named.values())
    n = ids.shape[1]
    named["template"] = [(0, taken), (stop, n)]
    return ids, Spans.of(n, **named)


def _answer(
    model: Any, tokenizer: Any, ids: Tensor, spans: Spans, method: Method | None, tokens: int
) -> dict[str, Any]:
    """A greedy answer, the distribution of its first token, and where the last row looked."""
    probe = SiteProbe("weights", rows="last")
    steered = nullcontext() if method is None else patch(model, method, spans=spans)
    with torch.no_grad(), steered:
        with watch(model, probe):
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        log_p = out.logits[0, -1].float().log_softmax(-1)
        found = [int(log_p.argmax())]
        stops = _stops(model)
        start = time.perf_counter()
        while len(found) < tokens and found[-1] not in stops:
            step = ids.new_tensor([[found[-1]]])
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            found.append(int(out.logits[0, -1].argmax()))
        seconds = time.perf_counter() - start
    top = log_p.topk(TOP)
    return {
        "text": tokenizer.decode(found, skip_special_tokens=True),
        "tokens": len(found),
        "top": [
            {"token": tokenizer.decode([token]), "p": float(p.exp())}
            for p, token in zip(top.values, top.indices.tolist(), strict=True)
        ],
        "seconds": None if len(found) == 1 else seconds / (len(found) - 1),
        "mass": _mass(probe.result(), spans, len(model.get_decoder().layers)),
        "log_p": log_p.cpu(),
    }


def _stops(model: Any) -> set[int]:
    """Tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return set() if end is None else set(end if isinstance(end, list) else [end])


def _mass(
    passes: list[dict[int, Tensor]], spans: Spans, layers: int
) -> dict[str, list[float]] | None:
    """Mass by span in every layer, mean over heads, of the one row that was seen."""
    if not passes or len(passes[0]) < layers:
        return None
    found: dict[str, list[float]] = {}
    for layer in sorted(passes[0]):
        row = passes[0][layer][0, :, -1].float().mean(0)
        every = torch.arange(row.shape[0])
        for span in spans.ranges:
            inside = spans.contains(span, every).to(row.device)
            found.setdefault(span, []).append(float(row[inside].sum()))
    return found


def summary(result: Mapping[str, Any]) -> list[str]:
    """What changed, in a sentence or two."""
    said = []
    same = result["before"]["text"] == result["after"]["text"]
    said.append("The answer is the same." if same else "The answer changed.")
    said.append(f"The next token's distribution moved by {result['kl']:.3g} nats.")
    if result["mass"] is not None:
        name, moved = max(
            ((span, _mean(x["after"]) - _mean(x["before"])) for span, x in result["mass"].items()),
            key=lambda pair: abs(pair[1]),
        )
        way = "gains" if moved >= 0 else "loses"
        said.append(
            f"Over all layers the span {name} {way} {abs(moved):.1%} of the last row's mass."
        )
    first, second = (result[x]["seconds"] for x in ("before", "after"))
    if first and second:
        said.append(f"A token takes {second / first:.2f} times as long.")
    return said


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
