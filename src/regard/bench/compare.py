"""``regard compare``: ways of attending, side by side on one language model and one text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..core.stats import MassByDistance, MassOn
from ..data import sample_text
from ..models import Method, Spans, StatsProbe, load, patch, watch
from ..models.progress import Progress
from .compare_table import table as table
from .meter import Meter
from .methods import SMOLLM2, Named, method
from .quality import Prediction, ask, haystack, needles, predict, prefill
from .selecting import Heads, How
from .steer_spans import RULE, check_sites, looks_ahead, of_prompt, of_text, told, try_out
from .tasks import suite
from .text import read_text, tokens
from .timing import PeakMemory, machine, synchronise

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_DECODED = 16
_SINKS = 4
# The extra pass that shows where attention went reads at most this many tokens.
_LOOK = 2048
# Room for the longest question and answer.
_ROOM = 48
_LEAST = 192


@dataclass(frozen=True)
class _Job:
    """What every method is measured on; predictions count from the row ``first`` on."""

    model: Any
    tokenizer: Any
    ids: Tensor
    hay: Tensor
    chores: Tensor | None
    seed: int
    first: int


def run(
    model: str = "smollm2",
    text: Path | str | None = None,
    length: int = 4096,
    methods: Sequence[str | How] = ("full", "window", "streaming"),
    seed: int = 0,
    tasks: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure quality, speed and memory of several ways of attending on the same tokens.

    Args:
        model: a name for :func:`regard.models.load`.
        text: a UTF-8 file, by default the sample text of the package.
        length: tokens to read.
        methods: names (``window``, ``streaming:512``, ``gift(alpha=3.0)``, ...), masks, selectors or
            methods. ``full`` is always measured. Steering methods get spans by the rule of
            :mod:`regard.bench.steer_spans`.
        seed: of the needles' and the tasks' numbers and places.
        tasks: also measure the long-context tasks of :mod:`regard.bench.tasks`.
        progress: called with (words, steps done, steps in all).

    Returns:
        A dict of plain numbers: ``rows`` (one a method), ``attention`` (where it went, without the
        methods that compute it in their own way or edit weights or scores), ``machine`` and what was
        read. Perplexity change and agreement are against ``full``; densities and bounds count pairs
        against dense causal attention; ``unpatched_ppl`` is the model without regard. Perplexities and
        agreement are those of the tokens ``scored``, all of them or, with a steering method among the
        methods, the second half of the text, for every method. ``spans`` of a row are what a steering
        method saw in the text, and ``ahead`` whether rows of the answer depended on later tokens, so
        that its perplexity is not that of a prediction; ``None`` in the rows of other methods.

    Raises:
        ValueError: an unknown method, a setting that it refuses, a text too short, a length beyond the
            model's positions, or a steering method that cannot run with these spans or this model.
    """
    # The cheap mistakes are reported before anything is loaded.
    if length < _LEAST:
        raise ValueError(
            f"compare: length must be {_LEAST} at least (the needles need room), got {length}"
        )
    chosen = _chosen(methods, length, SMOLLM2)
    content = sample_text() if text is None else read_text(text)
    name = "sample" if text is None else Path(text).name
    say = _Steps(progress, 2 + (3 + tasks) * len(chosen))
    say(f"loading {model}")
    loaded, tokenizer = load(model)
    loaded.eval()
    config = loaded.config.get_text_config()
    query = config.num_attention_heads
    heads = Heads(query, getattr(config, "num_key_value_heads", None) or query)
    chosen = _chosen(methods, length, heads)
    for one in chosen:
        if isinstance(one.how, Method):
            one.how.check_model(loaded)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"compare: length {length}, but {model} has {limit} positions")
    hidden = needles(DEPTHS, seed)
    facts = [(needle.depth, needle.fact) for needle in hidden]
    hay = haystack(tokenizer, content, facts, length - _ROOM)
    chores = None
    if tasks:
        facts = [fact for task in suite(seed) for fact in task.facts]
        chores = haystack(tokenizer, content, facts, length - _ROOM)
    ids = tokens(tokenizer, content, length, "the sample text" if text is None else str(text))
    steered = any(one.steers for one in chosen)
    first = length // 2 - 1 if steered else 0
    job = _Job(loaded, tokenizer, ids, hay, chores, seed, first)
    for one in chosen:
        if one.steers:
            assert isinstance(one.how, Method)
            try_out(loaded, one.name, one.how, ids)
    say("the model as it is")
    prefill(loaded, ids[:, :256])
    states, _ = prefill(loaded, ids)
    plain = predict(loaded, states, ids).since(first)
    del states
    rows: list[dict[str, Any]] = []
    attention: dict[str, Any] = {}
    dense: Prediction | None = None
    for one in chosen:
        row, seen, placed = _measure(job, one, say)
        dense = seen if dense is None else dense
        row["ppl_change"] = row["ppl"] / dense.perplexity - 1.0
        row["agreement"] = (seen.best == dense.best).double().mean().item()
        row["attention_speedup"] = (rows[0] if rows else row)["attention_s"] / row["attention_s"]
        rows.append(row)
        say(f"{one.name}: where attention goes")
        if placed:
            attention[one.name] = _where(job, one)
    say("done")
    return {
        "model": model,
        "text": {"name": name, "tokens": int(ids.shape[1])},
        "length": length,
        "seed": seed,
        "machine": machine(),
        "unpatched_ppl": plain.perplexity,
        "scored": [first + 1, length],
        "spans_rule": RULE if steered else None,
        "rows": rows,
        "attention": attention,
    }


def _chosen(methods: Sequence[str | How], length: int, heads: Heads) -> list[Named]:
    """The methods without repetition, ``full`` first: all others are measured against it."""
    named = {one.name: one for one in (method(text, length, heads) for text in ("full", *methods))}
    for one in named.values():
        if isinstance(one.how, Method):
            check_sites(one.name, one.how)
    return list(named.values())


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, words: str) -> None:
        if self.progress is not None:
            self.progress(words, min(self.done, self.total), self.total)
        self.done += 1


def _measure(job: _Job, one: Named, say: _Steps) -> tuple[dict[str, Any], Prediction, bool]:
    model, n = job.model, job.ids.shape[1]
    say(f"{one.name}: perplexity and speed")
    meter = Meter()
    spans = of_text(n) if one.steers else None
    ahead = None
    with meter.on(model, one.how, spans):
        with PeakMemory(model.device) as memory:
            start = time.perf_counter()
            states, cache = prefill(model, job.ids)
            synchronise(model.device)
            taken = time.perf_counter() - start
            spent, choosing = meter.seconds, meter.choosing
            seen = predict(model, states, job.ids).since(job.first)
        density, listed, plain = meter.share(listed=False), meter.share(listed=True), meter.plain
        decode = _decode_speed(model, cache, job.ids)
    del cache
    if one.steers:
        assert isinstance(one.how, Method)
        ahead = looks_ahead(model, one.how, job.ids, states)
    del states
    say(f"{one.name}: needles")
    with patch(model, one.how, spans=_whole(one, job.hay)):
        _, cache = prefill(model, job.hay)
        found = {
            str(needle.depth): ask(model, job.tokenizer, cache, needle.question, needle.answer)
            for needle in needles(DEPTHS, job.seed)
        }
    del cache
    row = {
        "method": one.name,
        "mask": one.entry or repr(one.how),
        "spans": None if spans is None else told(spans, n),
        "ahead": ahead,
        "ppl": seen.perplexity,
        "needle": found,
        "tasks": _tasks(job, one, say),
        "density": density,
        "bound": 1.0 / listed if listed else None,
        "prefill_s": taken,
        "prefill_tok_s": n / taken,
        "attention_s": spent,
        "choosing_s": choosing,
        "decode_tok_s": decode,
        "peak_mb": None if memory.peak is None else memory.peak / 1e6,
    }
    return row, seen, plain


def _whole(one: Named, prompt: Tensor) -> Spans | None:
    """Parts of what is a prompt as a whole, for a method that works on them."""
    return of_prompt(prompt.shape[1]) if one.steers else None


def _tasks(job: _Job, one: Named, say: _Steps) -> dict[str, float] | None:
    """Share of exact answers of every long-context task, all asked of one prompt."""
    if job.chores is None:
        return None
    say(f"{one.name}: tasks")
    with patch(job.model, one.how, spans=_whole(one, job.chores)):
        _, cache = prefill(job.model, job.chores)
        return {
            task.name: mean(
                ask(job.model, job.tokenizer, cache, question, answer)
                for question, answer in task.questions
            )
            for task in suite(job.seed)
        }


def _decode_speed(model: Any, cache: Any, ids: Tensor) -> float:
    """Tokens a second, one at a time, after the prompt in ``cache``; the first is not counted."""
    token = ids[:, -1:].to(model.device)
    start = 0.0
    with torch.no_grad():
        for step in range(_DECODED + 1):
            if step == 1:
                synchronise(model.device)
                start = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
    synchronise(model.device)
    return _DECODED / (time.perf_counter() - start)


def _where(job: _Job, one: Named) -> dict[str, Any]:
    """Mass by distance over all layers and heads, and the mean mass on the first keys by head."""
    n = min(job.ids.shape[1], _LOOK)
    edges = [0, *(1 << p for p in range((n - 1).bit_length() + 1))]
    probe = StatsProbe([MassByDistance(edges), MassOn(range(_SINKS))])
    spans = of_text(n) if one.steers else None
    with patch(job.model, one.how, spans=spans), watch(job.model, probe) as seen:
        prefill(job.model, job.ids[:, :n])
    layers = [seen.result()[0][layer] for layer in sorted(seen.result()[0])]
    by_distance = torch.stack([found["mass_by_distance"].mean((0, 1)) for found in layers]).mean(0)
    return {
        "tokens": n,
        "distance_edges": edges,
        "mass_by_distance": by_distance.tolist(),
        "sinks": [found["mass_on"].mean((0, 2)).tolist() for found in layers],
    }
