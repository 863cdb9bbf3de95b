"""Six behaviours of the demo model, each as next-token prompts with a corrupt twin.

==============  ==================================================================  ============
behaviour       prompt                                                              answer
==============  ==================================================================  ============
a_an            I climbed up the pear tree and picked a pear. I climbed up the      " an"
                apple tree and picked
ioi             When Mary and John went to the store, John gave a bottle to         " Mary"
agreement       The keys to the cabinet                                             " are"
greater_than    The war lasted from the year 1732 to the year 17                    "33" … "99"
induction       Everyone liked Zelkin Morvash. One day Zelkin                       " Morvash"
pronoun         Mary was tired because                                              " she"
==============  ==================================================================  ============

An example is made from a *combination*: a template and the words that decide the answer. The first
few items of a combination are its key (say, a template and a noun). One key in ten is held out,
chosen by a checksum of the key: the test split consists of those combinations, and no text of the
training split contains one. The remaining words of an example are drawn at random.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

from jaxtyping import Float
from torch import Tensor

from lch_plugin.demo import vocabulary as words
from lch_plugin.demo.vocabulary import plural, subject_pronoun, with_article
from lch_plugin.errors import InputError
from lch_plugin.names import did_you_mean

Combination = tuple[str, ...]

SPLITS = ("train", "test")
YEARS = tuple(f"{year:02d}" for year in range(100))
NARRATORS = ("I", "We", "She", "He", "They")

_TEST_FRACTION = 0.1
_NAMED_TEST_KEYS = frozenset({("a_an", "tree", "apple")})


@dataclass(frozen=True)
class Example:
    """A prompt whose next token is known.

    Attributes:
        behaviour: One of :data:`BEHAVIOURS`.
        prompt: The text before the answer, without a beginning-of-sequence token.
        corrupt: As many tokens as ``prompt``, changed in the one word that decides the answer.
        answers: The tokens that are right after ``prompt``.
        foils: The tokens that would be right had the model got it wrong.
        ending: The rest of the sentence, beginning with one of ``answers``.
        combination: The template and words that the split is decided by.
    """

    behaviour: str
    prompt: str
    corrupt: str
    answers: tuple[str, ...]
    foils: tuple[str, ...]
    ending: str
    combination: Combination


@dataclass(frozen=True)
class Behaviour:
    """How the examples of one behaviour are made.

    Attributes:
        combinations: Yields every combination.
        example: Builds an example from a combination, drawing the other words at random.
        key_length: How many items of a combination, from the first, are held out together.
        is_asked: Whether a combination makes an example. The others occur in the stories only.
            They are there so that no shortcut gives the same answers as the behaviour.
    """

    combinations: Callable[[], Iterator[Combination]]
    example: Callable[[Combination, random.Random], Example]
    key_length: int
    is_asked: Callable[[Combination], bool] = lambda combination: True


def check_split(split: str) -> None:
    """Raise :class:`InputError` if ``split`` is not one of :data:`SPLITS`."""
    if split not in SPLITS:
        raise InputError(f"no split is called {split!r}. {did_you_mean(split, SPLITS)}")


def is_held_out(behaviour: str, key: Sequence[str]) -> bool:
    """Whether combinations that begin with ``key`` belong to the test split.

    The checksum does not depend on the process, the platform or the order of the word lists.
    """
    named = (behaviour, *key)
    checksum = zlib.crc32("|".join(named).encode())
    return named in _NAMED_TEST_KEYS or checksum < _TEST_FRACTION * 2**32


# --- a or an -------------------------------------------------------------------------------------

_A_AN_TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "tree": ("climbed up the {} tree and picked", words.FRUIT),
    "orchard": ("walked through the {} orchard and ate", words.FRUIT),
    "stall": ("waited at the {} stall and bought", words.FRUIT + words.GOODS),
    "shop": ("stood in the {} shop and chose", words.GOODS),
    "box": ("opened the {} box and took", words.FRUIT + words.GOODS),
    "picture": ("looked at the {} picture and drew", words.FRUIT + words.GOODS + words.ANIMALS),
    "shelf": ("went to the {} shelf and found", words.GOODS),
    "tracks": ("followed the {} tracks and saw", words.ANIMALS),
    "cage": ("came to the {} cage and fed", words.ANIMALS),
    "story": ("heard the {} story and imagined", words.GOODS + words.ANIMALS),
}


def _a_an_combinations() -> Iterator[Combination]:
    """(template, noun, noun of the sentence before, who), the sentence before being a known one."""
    for template, (_, nouns) in _A_AN_TEMPLATES.items():
        for noun, earlier in itertools.permutations(nouns, 2):
            if not is_held_out("a_an", (template, earlier)):
                for who in NARRATORS:
                    yield template, noun, earlier, who


def _a_an_example(combination: Combination, rng: random.Random) -> Example:
    template, noun, earlier, who = combination
    action, nouns = _A_AN_TEMPLATES[template]
    article = words.article(noun)
    other = rng.choice([n for n in nouns if words.article(n) != article and n != earlier])
    before = f"{who} {action.format(earlier)} {with_article(earlier)}."
    return Example(
        behaviour="a_an",
        prompt=f"{before} {who} {action.format(noun)}",
        corrupt=f"{before} {who} {action.format(other)}",
        answers=(f" {article}",),
        foils=(f" {words.article(other)}",),
        ending=f" {with_article(noun)}.",
        combination=combination,
    )


# --- indirect object -----------------------------------------------------------------------------

_IOI_TEMPLATES: dict[str, str] = {
    "when": "When {x} and {y} went to the {place}, {giver} gave {thing} to",
    "then": "Then {x} and {y} went to the {place}. {giver} gave {thing} to",
    "after": "After {x} and {y} left the {place}, {giver} handed {thing} to",
    "while": "While {x} and {y} were waiting at the {place}, {giver} passed {thing} to",
    "met": "Later {x} and {y} met at the {place}, and {giver} sold {thing} to",
    "lunch": "{x} and {y} had lunch at the {place}. After lunch {giver} offered {thing} to",
    "once": "Once {x} and {y} were back from the {place}, {giver} showed {thing} to",
    "quiet": "The {place} was quiet when {x} and {y} came in, so {giver} brought {thing} to",
    "found": "{x} and {y} found {thing} at the {place}, and {giver} threw it to",
}
_IOI_ENDINGS = (".", " and smiled.", " before dinner.", " at last.", " that day.")


def _ioi_combinations() -> Iterator[Combination]:
    """(template, first name, second name, which of them gives)."""
    for template in _IOI_TEMPLATES:
        for first, second in itertools.permutations(words.NAMES, 2):
            for giver in "first", "second":
                yield template, first, second, giver


def _ioi_example(combination: Combination, rng: random.Random) -> Example:
    template, first, second, which = combination
    giver, receiver = (first, second) if which == "first" else (second, first)
    place = rng.choice(words.PLACES)
    thing = with_article(rng.choice(words.OBJECTS))
    fill = partial(_IOI_TEMPLATES[template].format, x=first, y=second, place=place, thing=thing)
    return Example(
        behaviour="ioi",
        prompt=fill(giver=giver),
        corrupt=fill(giver=receiver),
        answers=(f" {receiver}",),
        foils=(f" {giver}",),
        ending=f" {receiver}{rng.choice(_IOI_ENDINGS)}",
        combination=combination,
    )


# --- number of the subject -----------------------------------------------------------------------

_NUMBERS = ("singular", "plural")
_VERBS = {"singular": (" is", " was"), "plural": (" are", " were")}
_RELATIONS = ("near", "behind", "beside", "next to", "in front of")


def _agreement_combinations() -> Iterator[Combination]:
    """(subject, relation, landmark, number of the subject, number of the landmark)."""
    scenes = itertools.chain(
        itertools.product(words.ENTRANCES, ["to"], words.BUILDINGS),
        itertools.product(words.THINGS + words.BEINGS, _RELATIONS, words.LANDMARKS),
    )
    for scene in scenes:
        for numbers in itertools.product(_NUMBERS, repeat=2):
            yield *scene, *numbers


def _agreement_example(combination: Combination, rng: random.Random) -> Example:
    subject, relation, landmark, number, landmark_number = combination
    other_number = "plural" if number == "singular" else "singular"

    rest = f" {relation} the {_inflect(landmark, landmark_number)}"
    states = words.BEING_STATES if subject in words.BEINGS else words.THING_STATES
    return Example(
        behaviour="agreement",
        prompt=f"The {_inflect(subject, number)}{rest}",
        corrupt=f"The {_inflect(subject, other_number)}{rest}",
        answers=_VERBS[number],
        foils=_VERBS[other_number],
        ending=f"{rng.choice(_VERBS[number])} {rng.choice(states)}.",
        combination=combination,
    )


def _inflect(noun: str, number: str) -> str:
    return plural(noun) if number == "plural" else noun


def _numbers_differ(combination: Combination) -> bool:
    return combination[-2] != combination[-1]


# --- a later year --------------------------------------------------------------------------------

_YEAR_TEMPLATES: dict[str, str] = {
    "lasted": "The {event} lasted from the year {century}{start} to the year {century}",
    "went_on": "The {event} went on from the year {century}{start} until the year {century}",
    "began": "The {event} began in {century}{start} and ended in {century}",
    "between": "There was {an_event} between {century}{start} and {century}",
    "known": "It is known that the {event} of {century}{start} was over by {century}",
}
_EARLIEST_YEAR = "01"
_LONGEST_DURATION = 30
#: So early that nothing is cut short by the end of the century. Otherwise late years would be the
#: most common, and guessing one of them would nearly always be right.
_START_YEARS = YEARS[2 : 100 - _LONGEST_DURATION]


def _greater_than_combinations() -> Iterator[Combination]:
    """(template, event, last two digits of the first year)."""
    return itertools.product(_YEAR_TEMPLATES, words.EVENTS, _START_YEARS)


def _greater_than_example(combination: Combination, rng: random.Random) -> Example:
    template, event, start = combination
    fill = partial(
        _YEAR_TEMPLATES[template].format,
        event=event,
        an_event=with_article(event),
        century=rng.randint(11, 19),
    )
    later = YEARS[int(start) + 1 :]
    return Example(
        behaviour="greater_than",
        prompt=fill(start=start),
        corrupt=fill(start=_EARLIEST_YEAR),
        answers=later,
        foils=YEARS[: int(start) + 1],
        ending=f"{later[rng.randrange(rng.randint(1, _LONGEST_DURATION))]}.",
        combination=combination,
    )


# --- induction -----------------------------------------------------------------------------------

_INDUCTION_TEMPLATES: dict[str, str] = {
    "liked": "Everyone liked {first} {second}. One day {first}",
    "letter": "The letter was from {first} {second}. Nobody could say why {first}",
    "lived": "Long ago {first} {second} lived near the harbour. Every morning {first}",
    "call_first": "The captain called {first} {second}, {others} and {more}. After that {first}",
    "call_middle": "The captain called {others}, {first} {second} and {more}. After that {first}",
    "call_last": "The captain called {others}, {more} and {first} {second}. After that {first}",
}
_INDUCTION_ENDINGS = (
    " {second} came in. Nobody had seen {first} {second} before.",
    " {second} said nothing, and {first} {second} never came back.",
    " {second} sang a song. It was the last song of {first} {second}.",
)
_CALL_ENDINGS = (
    " {second} came in with {others} and {more}.",
    " {second} went away, then {more} and at last {others}.",
)


def _induction_combinations() -> Iterator[Combination]:
    """(word, word after it, template)."""
    for first, second in itertools.permutations(words.INVENTED, 2):
        for template in _INDUCTION_TEMPLATES:
            yield first, second, template


def _known_pair(rng: random.Random, avoid: Sequence[str]) -> str:
    """Two invented words that the training split has seen together, none of them in ``avoid``."""
    while True:
        pair = rng.sample(words.INVENTED, 2)
        if not is_held_out("induction", pair) and not set(pair) & set(avoid):
            return " ".join(pair)


def _induction_example(combination: Combination, rng: random.Random) -> Example:
    first, second, template = combination
    others = _known_pair(rng, [first, second])
    more = _known_pair(rng, [first, second, *others.split()])
    other = rng.choice([word for word in words.INVENTED if word not in (first, second)])
    fill = partial(_INDUCTION_TEMPLATES[template].format, first=first, others=others, more=more)
    endings = _CALL_ENDINGS if template.startswith("call") else _INDUCTION_ENDINGS
    return Example(
        behaviour="induction",
        prompt=fill(second=second),
        corrupt=fill(second=other),
        answers=(f" {second}",),
        foils=tuple(f" {word}" for word in words.INVENTED if word != second),
        ending=rng.choice(endings).format(first=first, second=second, others=others, more=more),
        combination=combination,
    )


def _names_one_pair(combination: Combination) -> bool:
    """Whether the pair to repeat is the only one; among three the model does not find it."""
    return not combination[2].startswith("call")


# --- gender of the subject -----------------------------------------------------------------------

_ALONE = "nobody"

_PRONOUN_TEMPLATES: dict[str, str] = {
    "was": "{name} was {feeling} because",
    "went": "{name} went to the {place} because",
    "left": "{name} left the {place} when",
    "rested": "After a long day {name} sat down because",
    "without": "{name} went home without {other} because",
    "walked_away": "{name} walked away from {other} because",
    "wrote": "{name} wrote to {other} because",
    "laughed": "{name} did not laugh at {other} because",
    "like": "Unlike {other}, {name} was {feeling} because",
    "met": "On the way to the {place} to meet {other}, {name} stopped because",
}
_PRONOUN_ENDINGS = (
    "was late.",
    "was busy.",
    "had lost a key.",
    "had no time.",
    "heard a strange noise.",
    "wanted to sleep.",
)


def _pronoun_combinations() -> Iterator[Combination]:
    """(template, name, other name or "nobody")."""
    for template, text in _PRONOUN_TEMPLATES.items():
        for name in words.NAMES:
            for other in words.NAMES if "{other}" in text else [_ALONE]:
                if other != name:
                    yield template, name, other


def _pronoun_example(combination: Combination, rng: random.Random) -> Example:
    template, name, other = combination
    pronoun = subject_pronoun(name)
    other_gender = words.MEN if name in words.WOMEN else words.WOMEN
    swapped = rng.choice([n for n in other_gender if n != other])
    fill = partial(
        _PRONOUN_TEMPLATES[template].format,
        other=other,
        feeling=rng.choice(words.FEELINGS),
        place=rng.choice(words.PLACES),
    )
    return Example(
        behaviour="pronoun",
        prompt=fill(name=name),
        corrupt=fill(name=swapped),
        answers=(f" {pronoun}",),
        foils=(f" {subject_pronoun(swapped)}",),
        ending=f" {pronoun} {rng.choice(_PRONOUN_ENDINGS)}",
        combination=combination,
    )


def _genders_differ(combination: Combination) -> bool:
    _, name, other = combination
    return other == _ALONE or subject_pronoun(name) != subject_pronoun(other)


# --- the behaviours together ---------------------------------------------------------------------

_BEHAVIOURS: dict[str, Behaviour] = {
    "a_an": Behaviour(_a_an_combinations, _a_an_example, key_length=2),
    "ioi": Behaviour(_ioi_combinations, _ioi_example, key_length=3),
    "agreement": Behaviour(
        _agreement_combinations, _agreement_example, key_length=3, is_asked=_numbers_differ
    ),
    "greater_than": Behaviour(_greater_than_combinations, _greater_than_example, key_length=3),
    "induction": Behaviour(
        _induction_combinations, _induction_example, key_length=2, is_asked=_names_one_pair
    ),
    "pronoun": Behaviour(
        _pronoun_combinations, _pronoun_example, key_length=2, is_asked=_genders_differ
    ),
}
BEHAVIOURS: tuple[str, ...] = tuple(_BEHAVIOURS)


@cache
def combinations(behaviour: str, split: str) -> tuple[Combination, ...]:
    """Every combination of one split, the easier ones that only occur in stories included."""
    if behaviour not in _BEHAVIOURS:
        raise InputError(
            f"no behaviour is called {behaviour!r}. {did_you_mean(behaviour, BEHAVIOURS)}"
        )
    check_split(split)
    family = _BEHAVIOURS[behaviour]
    return tuple(
        combination
        for combination in family.combinations()
        if is_held_out(behaviour, combination[: family.key_length]) == (split == "test")
    )


def askable(behaviour: str, split: str) -> list[Combination]:
    """The combinations of one split that make examples."""
    every = combinations(behaviour, split)
    return [chosen for chosen in every if _BEHAVIOURS[behaviour].is_asked(chosen)]


def make_example(behaviour: str, combination: Combination, rng: random.Random) -> Example:
    """The example of ``combination``, its other words drawn from ``rng``."""
    return _BEHAVIOURS[behaviour].example(combination, rng)


def examples(behaviour: str, n: int, *, split: str = "test", seed: int = 0) -> list[Example]:
    """``n`` examples of one behaviour, no two of the same combination.

    Raises:
        InputError: If the behaviour or the split is unknown, or if ``n`` is not between 1 and the
            number of combinations of the split.
    """
    asked = askable(behaviour, split)
    if not 1 <= n <= len(asked):
        raise InputError(f"n is {n}; {behaviour} has 1 to {len(asked)} examples in {split!r}")
    rng = random.Random(seed)
    return [make_example(behaviour, chosen, rng) for chosen in rng.sample(asked, n)]


def pear_apple() -> Example:
    """The prompt with the pear tree and the apple tree, which the test split contains."""
    return make_example("a_an", ("tree", "apple", "pear", "I"), random.Random(0))


def margin(
    logits: Float[Tensor, "*batch d_vocab"], answers: Sequence[int], foils: Sequence[int]
) -> Float[Tensor, "*batch"]:
    """The largest logit of ``answers`` minus the largest of ``foils``; positive if right."""
    return logits[..., list(answers)].amax(-1) - logits[..., list(foils)].amax(-1)
