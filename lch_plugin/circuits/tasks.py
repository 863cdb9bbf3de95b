"""Five behaviours that circuits are known for, as pairs of a clean and a corrupt prompt.

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
================  ==========================================  =======================  ============

The texts come from the generator of the embedded model (`lch_plugin.demo.tasks`); for another model
those are taken that its tokenizer reads pairwise in equal length and with answers of one token. The
tasks are those of Wang et al. (arXiv 2211.00593, IOI), Hanna et al. (arXiv 2305.00586,
greater-than), and of the LCH paper (a/an), with texts of our own.
"""

from __future__ import annotations

import itertools
import random

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.metrics import Comparison, logit_difference
from lch_plugin.circuits.prompts import Prompts, prompts, single_token
from lch_plugin.demo import vocabulary
from lch_plugin.demo.tasks import Example, askable, check_split, examples, is_held_out
from lch_plugin.errors import InputError

_BEHAVIOURS = {
    "an": "a_an",
    "ioi": "ioi",
    "greater_than": "greater_than",
    "agreement": "agreement",
    "induction": "induction",
}
TASKS = tuple(_BEHAVIOURS)
# How many examples are tried for each one wanted, where the tokenizer may refuse some.
_TRIED = 5
# In the generator's texts what begins in 01 ends by 31. Where that is late enough to be an answer
# to the clean prompt as well, the corrupt one would not be wrong: it would be more right.
_LAST_YEAR_OF_TWIN = 31


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
    reads = _Reader(model)
    usable = [e for e in _candidates(reads, name, n, split, seed) if reads.example(e)][:n]
    if len(usable) < n:
        raise InputError(
            f"only {len(usable)} of {n} pairs of the task {name!r} can be used with this "
            "tokenizer: clean and corrupt prompts need equal lengths, answers and foils one token "
            "each. Ask for fewer, or pass texts of your own to lch_plugin.circuits.prompts."
        )
    return prompts(
        model,
        [e.prompt for e in usable],
        [e.answers for e in usable],
        [e.foils for e in usable],
        [e.corrupt for e in usable],
        metric=metric,
    )


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
        if example.behaviour == "greater_than" and int(example.answers[0]) <= _LAST_YEAR_OF_TWIN:
            return False
        clean, corrupt = (self._model.to_tokens(t).shape for t in (example.prompt, example.corrupt))
        return clean == corrupt and all(map(self.token, (*example.answers, *example.foils)))


def _candidates(reads: _Reader, name: str, n: int, split: str, seed: int) -> list[Example]:
    if name not in _BEHAVIOURS:
        raise InputError(f"no task is called {name!r}; there are {', '.join(TASKS)}.")
    check_split(split)
    behaviour = _BEHAVIOURS[name]
    if name == "induction" and not reads.token(f" {vocabulary.INVENTED[0]}"):
        return _induction_of_names(reads, n, split, seed)
    found = examples(behaviour, n, split=split, seed=seed)
    if all(map(reads.example, found)):
        return found
    # As many more as there are: some cannot be used.
    most = len(askable(behaviour, split))
    return examples(behaviour, min(_TRIED * n, most), split=split, seed=seed)


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
                combination=(first, second, other),
            )
        )
    return found
