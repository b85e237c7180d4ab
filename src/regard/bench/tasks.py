"""Long-context tasks with exact answers, generated from a seed: what perplexity does not show.

All facts of a suite stand in one prompt, between the sentences of an ordinary text, so that one
prefill serves every question. An answer counts when greedy decoding gives every token of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_TEXT = """
amber anchor apron basket beacon bishop bottle branch bridge candle canyon carpet castle
cellar cherry circle copper cotton cradle dagger desert dragon engine fabric falcon
feather forest garden ginger hammer harbor helmet island jacket kettle ladder lantern
lemon marble meadow mirror needle orange parrot pepper pillow planet pocket ribbon rocket
saddle silver spider temple thread ticket tunnel turtle velvet violin walnut window
"""
_WORDS = _TEXT.split()
_PEOPLE = ("Alice", "Bruno", "Clara", "Derek", "Elena", "Frank", "Greta", "Henry", "Irene", "Jonas")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: ``passkey``, ``keys``, ``variables``, ``copy`` or ``recall``.
        facts: (depth in the prompt, words).
        questions: (words at the end of the prompt, the words that must follow).
    """

    name: str
    facts: tuple[tuple[float, str], ...]
    questions: tuple[tuple[str, str], ...]


def passkey(rng: random.Random) -> Task:
    """One number at a random depth (arXiv 2305.16300, section 4)."""
    key = str(rng.randint(10000, 99999))
    fact = f" The pass key is {key}. Remember it. {key} is the pass key."
    return Task("passkey", ((rng.uniform(0.1, 0.9), fact),), (("\n\nThe pass key is", f" {key}"),))


def keys(rng: random.Random, count: int = 4) -> Task:
    """Many needles of one form; each is asked for (RULER's multi-key needles, arXiv 2404.06654)."""
    people = rng.sample(_PEOPLE, count)
    numbers = [str(rng.randint(10000, 99999)) for _ in people]
    depths = [(i + rng.uniform(0.2, 0.8)) / count for i in range(count)]
    form = "The locker number of {} is"
    facts = tuple(
        (depth, f" {form.format(person)} {number}.")
        for depth, person, number in zip(depths, people, numbers, strict=True)
    )
    questions = tuple(
        (f"\n\n{form.format(person)}", f" {number}")
        for person, number in zip(people, numbers, strict=True)
    )
    return Task("keys", facts, questions)


def variables(rng: random.Random, hops: int = 3) -> Task:
    """A chain of assignments across the prompt; every variable of it is asked for (RULER's variable
    tracking)."""
    names = [f"VAR_{letter}" for letter in rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", hops)]
    value = str(rng.randint(10000, 99999))
    values = [value, *names[:-1]]
    facts = tuple(
        ((i + rng.uniform(0.2, 0.8)) / hops, f" Let {name} = {given}.")
        for i, (name, given) in enumerate(zip(names, values, strict=True))
    )
    chain = ", ".join(f"{name} = {given}" for name, given in zip(names[1:], names, strict=False))
    questions = tuple(
        (f"\n\nWe know that {chain}. So the value of {name} is", f" {value}") for name in names
    )
    return Task("variables", facts, questions)


def copy(rng: random.Random, length: int = 12, start: int = 3) -> Task:
    """A random list of words that is to be continued word by word from its beginning."""
    words = rng.sample(_WORDS, length)
    fact = f" The list of words: {' '.join(words)}."
    question = f"\n\nThe list of words: {' '.join(words[:start])}"
    return Task(
        "copy", ((rng.uniform(0.1, 0.9), fact),), ((question, f" {' '.join(words[start:])}"),)
    )


def recall(rng: random.Random, pairs: int = 8, asked: int = 4) -> Task:
    """Many pairs of words in one place, some of them asked for (multi-query associative recall,
    arXiv 2312.04927)."""
    words = rng.sample(_WORDS, 2 * pairs)
    table = list(zip(words[:pairs], words[pairs:], strict=True))
    fact = " The pairs are: " + ", ".join(f"{a} goes with {b}" for a, b in table) + "."
    questions = tuple(
        (f"\n\nOf the pairs, {a} goes with", f" {b}") for a, b in rng.sample(table, asked)
    )
    return Task("recall", ((rng.uniform(0.1, 0.9), fact),), questions)


TASKS: dict[str, Callable[[random.Random], Task]] = {
    fn.__name__: fn for fn in (passkey, keys, variables, copy, recall)
}


def suite(seed: int = 0) -> list[Task]:
    """Every task once, drawn with the seed; the same seed gives the same tasks."""
    return [make(random.Random(f"{name} {seed}")) for name, make in TASKS.items()]
