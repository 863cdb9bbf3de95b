"""Held-out prompts of several kinds, each with a twin that differs in the word that decides.

A pair is kept if the tokenizer reads both in equal length, and answer and foil as one token each.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lch_plugin.demo.tasks import examples

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NAMES = [
    "Mary", "John", "Tom", "Anna", "James", "Sarah", "David", "Laura", "Paul", "Alice", "Peter",
    "Susan", "Mark", "Emma",
]  # fmt: skip
WORDS = [
    "river", "window", "garden", "engine", "letter", "mountain", "bottle", "horse", "market",
    "winter", "paper", "doctor",
]  # fmt: skip
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "Russia": "Moscow", "Greece": "Athens", "Ireland": "Dublin", "Egypt": "Cairo",
    "Austria": "Vienna", "Iraq": "Baghdad", "Iran": "Tehran", "China": "Beijing",
    "Sweden": "Stockholm", "Portugal": "Lisbon", "Turkey": "Ankara", "England": "London",
}  # fmt: skip
SUBJECTS = {
    "key": "keys", "book": "books", "dog": "dogs", "picture": "pictures", "car": "cars",
    "door": "doors", "tree": "trees", "letter": "letters", "child": "children", "boy": "boys",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A prompt and its twin; what comes after each is the other's foil."""

    kind: str
    prompt: str
    twin: str
    answer: str
    foil: str


def facts(rng: random.Random) -> Iterator[Pair]:
    for country, other in _pairs(list(CAPITALS), rng):
        ask = "The capital of {} is the city of".format
        answers = (f" {CAPITALS[one]}" for one in (country, other))
        yield Pair("facts", ask(country), ask(other), *answers)


def ioi(rng: random.Random) -> Iterator[Pair]:
    for a, b in _pairs(NAMES, rng):
        say = f"When {a} and {b} went to the store, {{}} gave a bottle of milk to".format
        yield Pair("ioi", say(b), say(a), f" {a}", f" {b}")


def copying(rng: random.Random) -> Iterator[Pair]:
    while True:
        *words, foil = rng.sample(WORDS, 7)
        first, key, answer = words[:2], words[2], words[3]
        say = f"{' '.join(first)} {key} {{}} {' '.join(words[4:])} {' '.join(first)} {key}".format
        yield Pair("copying", say(answer), say(foil), f" {answer}", f" {foil}")


def agreement(rng: random.Random) -> Iterator[Pair]:
    for one, other in _pairs(list(SUBJECTS), rng):
        many = rng.random() < 0.5
        say = f"The {{}} near the {SUBJECTS[other] if rng.random() < 0.5 else other}".format
        forms, verbs = [one, SUBJECTS[one]], [" is", " are"]
        yield Pair("agreement", say(forms[many]), say(forms[not many]), *_turned(verbs, many))


def arithmetic(rng: random.Random) -> Iterator[Pair]:
    while True:
        a, b, c, d, e, f, g = (rng.randint(1, 5) for _ in range(7))
        shown = ", ".join(
            f"{NUMBERS[x]} plus {NUMBERS[y]} equals {NUMBERS[x + y]}" for x, y in ((a, b), (c, d))
        )
        if f != g and {(a, b), (c, d)}.isdisjoint({(e, f), (e, g)}):
            say = f"{shown}, {NUMBERS[e]} plus {{}} equals".format
            answers = (f" {NUMBERS[e + x]}" for x in (f, g))
            yield Pair("arithmetic", say(NUMBERS[f]), say(NUMBERS[g]), *answers)


def _pairs(values: list[str], rng: random.Random) -> list[tuple[str, str]]:
    found = list(itertools.permutations(values, 2))
    rng.shuffle(found)
    return found


def _turned(values: list[str], turn: bool) -> list[str]:
    return values[::-1] if turn else values


KINDS: dict[str, Callable[[random.Random], Iterator[Pair]]] = {
    one.__name__: one for one in (facts, ioi, copying, agreement, arithmetic)
}
EMBEDDED_KINDS = ("a_an", "ioi", "agreement", "induction")  # What the embedded model knows.


def pairs(model: Any, n: int, seed: int, *, embedded: bool = False) -> list[Pair]:
    """So many of each kind, in turn, which the model's tokenizer can read."""
    found = []
    for kind in EMBEDDED_KINDS if embedded else KINDS:
        if embedded:
            tried: Iterator[Pair] = (
                Pair(kind, e.prompt, e.corrupt, e.answers[0], e.foils[0])
                for e in examples(kind, 3 * n, split="test", seed=seed)
            )
        else:
            tried = KINDS[kind](random.Random(f"{seed} {kind}"))
        readable = (pair for pair in itertools.islice(tried, 300) if is_readable(model, pair))
        some = list(itertools.islice(dict.fromkeys(readable), n))
        if len(some) < n:
            raise SystemExit(f"{kind}: the tokenizer reads {len(some)} of {n} pairs as needed.")
        found.append(some)
    return [pair for turn in zip(*found, strict=True) for pair in turn]


def is_readable(model: Any, pair: Pair) -> bool:
    if model.to_tokens(pair.prompt).shape != model.to_tokens(pair.twin).shape:
        return False
    one = (model.to_tokens(t, prepend_bos=False).shape[1] == 1 for t in (pair.answer, pair.foil))
    return pair.answer != pair.foil and all(one)
