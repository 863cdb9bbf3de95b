"""Labels of the demo models' data, known exactly because the data were made or come with them.

Of a story: the part of speech of every word, by the word lists and sentences it is made of, and the
behaviour that every passage is an example of, to be told from the passage or from one of its words.
Of a digit: which it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo import vocabulary as words
from lch_plugin.demo.corpus import Story, describe, write_stories
from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR, digits
from lch_plugin.demo.vocabulary import plural
from lch_plugin.errors import InputError
from lch_plugin.names import did_you_mean
from lch_plugin.saes.comparison.data import Labelled

Span = tuple[int, int, str]

# Fewer than there are on average, 37 and 27, so that there are stories enough.
_TOKENS_OF_A_STORY = {"train": 34, "test": 24}

#: Splits a text as the demo tokenizer does, the spaces left out.
_WORD = re.compile(r"[^\W\d]+|\d\d|[^\w\s]")

_NOUNS = words.FRUIT + words.ANIMALS + words.GOODS + words.OBJECTS + words.PLACES + words.EVENTS
# Those that occur in the plural too.
_INFLECTED = words.THINGS + words.BEINGS + words.LANDMARKS + words.ENTRANCES + words.BUILDINGS
_WORDS = {
    "noun": """
        afternoon bread brothers cage captain dark day dinner end evening front history hour lunch
        morning news night noise people plan roof shop sisters sky Snow song soup stall story
        stranger summer tea time times tracks train village walk way weather wind year""",
    "adjective": """
        best blue different good icy long rainy strong sunny warm windy""",
    "verb": """
        am are asked ate began bought brought called came chose climbed could did do drew ended fed
        fell followed found gave had handed has heard helped imagined is knew know known lasted
        laugh laughed left liked lived looked lost made meet met offered opened passed picked played
        put rain ran read said sang sat saw say seen showed sleep slept smiled sold stayed stood
        stopped talked threw told took waited waiting walked wanted was went were wrote""",
    "article": "A The a an the",
    "pronoun": """
        Everyone He I It Nobody She Something They We everyone he her his it my nothing she they
        what""",
    "preposition": """
        Unlike about at behind beside between by for from near of through under until with
        without""",
    "conjunction": "And When While and because but when",
    "adverb": """
        Later Long Not Then again ago around away back down far never not then very well""",
    "number": "two three",
    "punctuation": '" , . ?',
}
# Words that are more than one of these, such as the adverb and preposition "in", or none of them.
_AMBIGUOUS = """
    After Every In On Once One That There Where all before home in last next no on over so that
    there to up where why"""


@cache
def lexicon() -> dict[str, str]:
    """Part of speech by word, of those words of the stories that are never any other.

    "orange" is a noun and an adjective in the stories, so it is left out.
    """
    found = {kind: set(text.split()) for kind, text in _WORDS.items()}
    found["noun"] |= {*_NOUNS, *_INFLECTED, *map(plural, _INFLECTED)}
    found["name"] = set(words.NAMES + words.INVENTED)
    found["adjective"] |= {
        *(words.FEELINGS + words.ADJECTIVES + words.THING_STATES + words.BEING_STATES),
    }
    found["number"] |= {f"{number:02d}" for number in range(100)}
    kinds: dict[str, list[str]] = {}
    for kind, members in found.items():
        for word in members - {*_AMBIGUOUS.split()}:
            kinds.setdefault(word, []).append(kind)
    return {word: of[0] for word, of in kinds.items() if len(of) == 1}


def parts_of_speech(text: str) -> list[Span]:
    """Where each word of a story is whose part of speech is certain, and which it is."""
    return [
        (match.start(), match.end(), lexicon()[match[0]])
        for match in _WORD.finditer(text)
        if match[0] in lexicon()
    ]


def behaviours(story: Story) -> list[Span]:
    """Where each passage is that is an example of a behaviour, and of which."""
    spans, start = [], 0
    for behaviour, passage in story.passages:
        if behaviour is not None:
            spans.append((start, start + len(passage), behaviour))
        start += len(passage) + 1
    return spans


def labelled_stories(n: int, *, split: str = "train", seed: int = 0) -> Labelled:
    """The texts of `lch_plugin.demo.corpus.stories`, with all kinds of labels.

    Raises:
        InputError: ``n`` is less than 1, or there is no such split.
    """
    written = list(write_stories(n, split=split, seed=seed))
    passages = [behaviours(story) for story in written]
    return Labelled(
        [story.text for story in written],
        {
            "part of speech": [parts_of_speech(story.text) for story in written],
            "behaviour": passages,
            "behaviour, by word": [
                [
                    (start + word.start(), start + word.end(), behaviour)
                    for start, end, behaviour in spans
                    for word in _WORD.finditer(story.text[start:end])
                ]
                for story, spans in zip(written, passages, strict=True)
            ],
        },
        describe(written, split, seed),
    )


def labelled_digits(split: str) -> Labelled:
    """The images of `lch_plugin.demo.vision.digits`, and which digits they show.

    Raises:
        InputError: no such split.
    """
    images, labels = digits(split)
    name = f"{len(images):,} handwritten digits of scikit-learn, {split} split"
    return Labelled(images, {"digit": labels.tolist()}, name)


@dataclass(frozen=True)
class Task:
    """An embedded model, a component of it, and labelled data to compare SAEs with.

    Attributes:
        model: directory of the model.
        module: name of the component.
        train, test: to train on, and held out.
    """

    model: Path
    module: str
    train: Labelled
    test: Labelled


def embedded_task(name: str, n_rows: int, n_test_rows: int, *, seed: int = 0) -> Task:
    """One of the two: ``"digits"``, or ``"stories"``, as many as have so many tokens.

    Raises:
        InputError: there is no such task.
    """
    if name == "digits":
        train, test = labelled_digits("train"), labelled_digits("test")
        return Task(DEMO_VISION_MODEL_DIR, "encoder.layer.2.mlp", train, test)
    if name != "stories":
        raise InputError(f"no task is called {name!r}. {did_you_mean(name, ('digits', 'stories'))}")
    train, test = (
        labelled_stories(10 + n // _TOKENS_OF_A_STORY[split], split=split, seed=seed)
        for split, n in (("train", n_rows), ("test", n_test_rows))
    )
    return Task(DEMO_MODEL_DIR, "transformer.h.2.mlp", train, test)
