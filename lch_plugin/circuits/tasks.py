"""Behaviours that circuits are known for, as pairs of a clean and a corrupt prompt.

================  ==========================================  =======================  ============
task              clean                                       corrupt                  answer, foil
================  ==========================================  =======================  ============
``an``            ... I climbed up the apple tree and picked  ... the pear tree ...    " an", " a"
``ioi``           When Mary and John went to the store, John  ..., Mary gave ...       " Mary",
                  gave a bottle to                                                     " John"
``greater_than``  The war lasted from the year 1732 to the    ... from the year 1701   33 to 99,
                  year 17                                     ...                      00 to 32
``agreement``     The keys to the cabinet                     The key to ...           " are"...,
                                                                                       " is"...
``induction``     Everyone liked Zelkin Morvash. One day      Everyone liked Zelkin    " Morvash",
                  Zelkin                                      Drutine. ...             the others
``pronoun``       Mary was tired because                      John was tired because   " she", " he"
``capitals``      The capital of France is                    The capital of Italy     " Paris",
                                                              is                       " Rome"
================  ==========================================  =======================  ============

The texts come from the generator of the embedded model (`lch_plugin.demo.tasks`), which knows no
capitals; for another model those are taken that its tokenizer reads pairwise in equal length and
with answers of one token. Where that has invented words in pieces, induction takes names; where it
has the digits of a year one by one, greater-than asks for the decade: after 1752, what follows 17
is a digit above 5, and not below. The tasks are those of Wang et al. (arXiv 2211.00593, IOI), Hanna
et al. (arXiv 2305.00586, greater-than), and of the LCH paper (a/an), with texts of our own.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pandas as pd
import torch

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.prompt_batches import Prompts, measured, prompts, single_token
from lch_plugin.demo import vocabulary
from lch_plugin.demo.tasks import Example, askable, check_split, examples, is_held_out
from lch_plugin.errors import InputError
from lch_plugin.metrics import Comparison, logit_difference
from lch_plugin.names import did_you_mean

_BEHAVIOURS = {
    "an": "a_an",
    "ioi": "ioi",
    "greater_than": "greater_than",
    "agreement": "agreement",
    "induction": "induction",
    "pronoun": "pronoun",
}
TASKS = (*_BEHAVIOURS, "capitals")
# How many examples are tried for each one wanted, where the tokenizer may refuse some.
_TRIED = 5
# In the generator's texts what begins in 01 ends by 31. Where that is late enough to be an answer
# to the clean prompt as well, the corrupt one would not be wrong: it would be more right.
_LAST_YEAR_OF_TWIN = 31
_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "Russia": "Moscow", "Greece": "Athens", "Ireland": "Dublin", "Egypt": "Cairo",
    "Austria": "Vienna", "Poland": "Warsaw", "Cuba": "Havana", "Kenya": "Nairobi",
    "Iraq": "Baghdad", "Iran": "Tehran", "China": "Beijing", "Sweden": "Stockholm",
    "Norway": "Oslo", "Portugal": "Lisbon", "Canada": "Ottawa", "Peru": "Lima",
    "Chile": "Santiago", "Turkey": "Ankara", "Hungary": "Budapest", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Belgium": "Brussels", "Syria": "Damascus", "Lebanon": "Beirut",
    "Thailand": "Bangkok", "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade",
    "England": "London", "Scotland": "Edinburgh", "Switzerland": "Bern", "Jamaica": "Kingston",
    "Australia": "Canberra", "Indonesia": "Jakarta", "Vietnam": "Hanoi", "Nepal": "Kathmandu",
    "Afghanistan": "Kabul",
}  # fmt: skip
_CAPITAL_TEMPLATES = {
    "is": "The capital of {country} is",
    "city": "The capital of {country} is the city of",
    "question": "Q: What is the capital of {country}? A: The capital is",
    "guide": "Our guide to {country} begins in its capital,",
    "travelled": "We travelled all over {country} and ended in the capital,",
}


def task(
    model: LensModel,
    name: str,
    n: int = 60,
    *,
    split: str = "test",
    metric: Comparison = logit_difference,
    seed: int = 0,
) -> list[Prompts]:
    """Clean and corrupt prompts of one behaviour, with a metric that compares answers with foils.

    Args:
        model: whose tokenizer reads them.
        name: one of `TASKS`.
        n: pairs.
        split: ``"train"`` to find a circuit on and ``"test"`` to judge it by share no example.
        metric: as `lch_plugin.circuits.prompts`.
        seed: of the choice.

    Raises:
        InputError: no such task or split, or the tokenizer reads too few of its texts as needed.
    """
    usable, _ = _usable(model, name, n, split, seed)
    return _prompts(model, usable, metric)


@dataclass(frozen=True)
class TemplateReport:
    """What a tokenizer and a model make of the pairs of one template of a task.

    Attributes:
        template: its name.
        example: a clean prompt.
        readable: share of the template's pairs that the tokenizer reads as the task needs them.
        n: pairs that were measured.
        accuracy: share of these on which the metric is above zero.
        clean, corrupt: mean of the metric on the prompts and on their twins, in its units, both by
            the answers to the clean prompts.
    """

    template: str
    example: str
    readable: float
    n: int
    accuracy: float
    clean: float
    corrupt: float


def task_templates(
    model: LensModel,
    name: str,
    n: int = 60,
    *,
    split: str = "train",
    metric: Comparison = logit_difference,
    seed: int = 0,
) -> list[TemplateReport]:
    """Which templates of a task a tokenizer can express, and how well the model does each.

    To be asked before a circuit is searched for: a model that gets a task wrong has no circuit of
    it. `solved` keeps the pairs that it gets right. Templates without a pair are left out.

    Args, Raises:
        As `task`.
    """
    usable, readable = _usable(model, name, n, split, seed)
    values: dict[tuple[str, str | None], list[float]] = {}
    for batch in _prompts(model, usable, metric):
        assert batch.corrupt is not None
        twins = replace(batch, clean=batch.corrupt)
        both = torch.stack([measured(model, one) for one in (batch, twins)], 1)
        values.update(zip(batch.texts, both.tolist(), strict=True))
    by_template: dict[str, list[Example]] = {}
    for example in usable:
        by_template.setdefault(_template(example), []).append(example)
    found = []
    for template, some in by_template.items():
        both = torch.tensor([values[e.prompt, e.corrupt] for e in some], dtype=torch.float64)
        found.append(
            TemplateReport(
                template,
                some[0].prompt,
                readable[template],
                len(some),
                float((both[:, 0] > 0).double().mean()),
                *both.mean(0).tolist(),
            )
        )
    return found


def _prompts(model: LensModel, some: list[Example], metric: Comparison) -> list[Prompts]:
    return prompts(
        model,
        [e.prompt for e in some],
        [e.answers for e in some],
        [e.foils for e in some],
        [e.corrupt for e in some],
        metric=metric,
    )


def _template(example: Example) -> str:
    place = {"agreement": 1, "induction": 2}.get(example.behaviour, 0)
    return example.combination[place]


def _usable(
    model: LensModel, name: str, n: int, split: str, seed: int
) -> tuple[list[Example], dict[str, float]]:
    """Pairs that the tokenizer can read, and by template, the share of those tried that it can."""
    if n < 1:
        raise InputError(f"n={n}: a task has at least one pair.")
    reads = _Reader(model)
    tried = _candidates(reads, name, n, split, seed)
    are_read = list(map(reads.example, tried))
    usable = list(itertools.compress(tried, are_read))[:n]
    if len(usable) < n:
        cure = "Ask for fewer" if usable else "Take another task"
        raise InputError(
            f"only {len(usable)} of {n} pairs of the task {name!r} can be used with this "
            "tokenizer: clean and corrupt prompts need equal lengths, answers and foils one token "
            f"each. {cure}, or pass texts of your own to lch_plugin.circuits.prompts."
        )
    return usable, pd.Series(are_read).groupby(list(map(_template, tried))).mean().to_dict()


class _Reader:
    """Whether a model's tokenizer reads texts as a task needs them."""

    def __init__(self, model: LensModel) -> None:
        self._model = model
        self._known: dict[str, bool] = {}

    def token(self, text: str) -> bool:
        """As one token."""
        if text not in self._known:
            try:
                single_token(self._model, text)
                self._known[text] = True
            except InputError:
                self._known[text] = False
        return self._known[text]

    def example(self, example: Example) -> bool:
        """As a pair that differs, of equal length, with answers and foils of one token each."""
        clean, corrupt = map(self._model.to_tokens, (example.prompt, example.corrupt))
        if clean.shape != corrupt.shape or torch.equal(clean, corrupt):
            return False
        return all(map(self.token, (*example.answers, *example.foils)))


def _candidates(reads: _Reader, name: str, n: int, split: str, seed: int) -> list[Example]:
    """Examples of a task, as many as needed or, where some cannot be used, several times that."""
    if name not in TASKS:
        raise InputError(f"no task is called {name!r}. {did_you_mean(name, TASKS)}")
    check_split(split)
    if name == "capitals":
        return _capitals(n * _TRIED, split, seed)
    behaviour = _BEHAVIOURS[name]
    if name == "induction" and not reads.token(f" {vocabulary.INVENTED[0]}"):
        return _induction_of_names(reads, n, split, seed)
    if name != "greater_than":
        found = examples(behaviour, n, split=split, seed=seed)
        if all(map(reads.example, found)):
            return found
    most = len(askable(behaviour, split))
    found = examples(behaviour, min(_TRIED * n, most), split=split, seed=seed)
    if name != "greater_than":
        return found
    if not reads.token("32") and reads.token("3"):
        return [e for e in map(_by_decade, found) if e.answers and e.foils]
    return [e for e in found if int(e.answers[0]) > _LAST_YEAR_OF_TWIN]


def _by_decade(example: Example) -> Example:
    """Greater-than in digits: the next one is the decade, and its own may go on or be over."""
    century, year = example.prompt[-2:], example.combination[2]
    decade = int(year[0])
    return replace(
        example,
        corrupt=example.prompt.replace(f"{century}{year}", f"{century}0{year[1]}"),
        answers=tuple(str(digit) for digit in range(decade + 1, 10)),
        foils=tuple(str(digit) for digit in range(decade)),
    )


def _capitals(n: int, split: str, seed: int) -> list[Example]:
    asked = [
        (template, *pair)
        for template in _CAPITAL_TEMPLATES
        for pair in itertools.permutations(_CAPITALS, 2)
        # Both orders in one split: they are each other's twins.
        if is_held_out("capitals", sorted(pair)) == (split == "test")
    ]
    return [
        Example(
            behaviour="capitals",
            prompt=_CAPITAL_TEMPLATES[template].format(country=country),
            corrupt=_CAPITAL_TEMPLATES[template].format(country=other),
            answers=(f" {_CAPITALS[country]}",),
            foils=(f" {_CAPITALS[other]}",),
            ending=f" {_CAPITALS[country]}.",
            combination=(template, country, other),
        )
        for template, country, other in random.Random(seed).sample(asked, min(n, len(asked)))
    ]


def _induction_of_names(reads: _Reader, n: int, split: str, seed: int) -> list[Example]:
    """The same with names, for tokenizers to which invented words are several tokens."""
    known = [name for name in vocabulary.NAMES if reads.token(f" {name}")]
    pairs = [
        pair
        for pair in itertools.permutations(known, 2)
        if is_held_out("induction", pair) == (split == "test")
    ]
    rng = random.Random(seed)
    found = []
    for first, second in rng.sample(pairs, min(n, len(pairs))) if len(known) > 2 else ():
        other = rng.choice([name for name in known if name not in (first, second)])
        text = f"Everyone liked {first} {{}}. One day {first}"
        found.append(
            Example(
                behaviour="induction",
                prompt=text.format(second),
                corrupt=text.format(other),
                answers=(f" {second}",),
                foils=(f" {other}",),
                ending=f" {second} came in.",
                combination=(first, second, "liked"),
            )
        )
    return found
