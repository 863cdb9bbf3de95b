"""Labels of stories and digits, against what the generator is known to have written."""

from __future__ import annotations

import hashlib
import random
import re

import pytest

from lch_plugin.demo.corpus import stories, write_stories, write_story
from lch_plugin.demo.tasks import BEHAVIOURS
from lch_plugin.demo.vision import digits
from lch_plugin.errors import InputError
from lch_plugin.saes.comparison.embedded import (
    behaviours,
    embedded_task,
    labelled_digits,
    labelled_stories,
    lexicon,
    parts_of_speech,
)

#: Words of the stories that are more than one part of speech in them, or none of those labelled.
UNLABELLED = """
    After Every In On Once One That There Where all before home in last lost next no on orange over
    so that there to up where why"""


def tagged(text: str) -> dict[str, str]:
    return {text[start:end]: kind for start, end, kind in parts_of_speech(text)}


def test_the_stories_are_what_they_were() -> None:
    """The embedded model was trained on them, and published results are of them."""
    digests = [
        hashlib.sha256("\n".join(told).encode()).hexdigest()
        for told in (stories(5000, seed=3), stories(5000, split="test", seed=7))
    ]
    assert digests == [
        "ecdc419351e6ea132565edf5b39926b005f9405735590f79574eef4934e9816a",
        "84c74f71f3fb73d15d8f21180cd5f1c7ce320f346e937c47d47919a38d80278b",
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_other_word_has_a_part_of_speech(split: str) -> None:
    text = " ".join(stories(4000, split=split, seed=1))
    words = set(re.findall(r"[^\W\d]+|\d\d|[^\w\s]", text))
    assert words - lexicon().keys() <= {*UNLABELLED.split()}
    assert not {*UNLABELLED.split()} & lexicon().keys()


def test_parts_of_speech_of_sentences() -> None:
    assert tagged("When Mary and John went to the store, John gave a bottle to Mary.") == {
        "When": "conjunction",
        "Mary": "name",
        "and": "conjunction",
        "John": "name",
        "went": "verb",
        "the": "article",
        "store": "noun",
        ",": "punctuation",
        "gave": "verb",
        "a": "article",
        "bottle": "noun",
        ".": "punctuation",
    }
    assert tagged("The war lasted from 1732 until 1745.") == {
        "The": "article",
        "war": "noun",
        "lasted": "verb",
        "from": "preposition",
        "17": "number",
        "32": "number",
        "until": "preposition",
        "45": "number",
        ".": "punctuation",
    }
    assert tagged("Zelkin never put her lovely children beside shelves") == {
        "Zelkin": "name",
        "never": "adverb",
        "put": "verb",
        "her": "pronoun",
        "lovely": "adjective",
        "children": "noun",
        "beside": "preposition",
        "shelves": "noun",
    }


# What of a combination is in its passage, word for word.
WORDS = {
    "a_an": slice(1, 4),
    "ioi": slice(1, 3),
    "agreement": slice(1, 2),
    "greater_than": slice(1, 3),
    "induction": slice(0, 2),
    "pronoun": slice(1, 2),
}


def test_passages_are_those_of_the_examples() -> None:
    rng = random.Random(0)
    found = set()
    for _ in range(400):
        story = write_story(rng)
        assert story.text == " ".join(text for _, text in story.passages)
        for (start, end, kind), (behaviour, combination) in zip(
            behaviours(story), story.combinations, strict=True
        ):
            passage = story.text[start:end]
            assert kind == behaviour
            assert passage == passage.strip()
            assert passage.endswith(".")
            assert all(word in passage for word in combination[WORDS[behaviour]])
            found.add(behaviour)
    assert found == set(BEHAVIOURS)


def test_words_of_a_passage_have_its_behaviour() -> None:
    data = labelled_stories(50, seed=4)
    assert list(data.inputs) == list(stories(50, seed=4))
    for text, passages, by_word in zip(
        data.inputs, data.labels["behaviour"], data.labels["behaviour, by word"], strict=True
    ):
        for start, end, kind in passages:
            words = [text[a:b] for a, b, label in by_word if start <= a < end and label == kind]
            assert "".join(words) == text[start:end].replace(" ", "")
        assert sum(b - a for a, b, _ in by_word) == sum(
            len(text[a:b].replace(" ", "")) for a, b, _ in passages
        )


def test_digits_are_labelled() -> None:
    data = labelled_digits("test")
    images, labels = digits("test")
    assert data.labels == {"digit": labels.tolist()}
    assert data.inputs.equal(images)


def test_how_many_sentences_went_is_told() -> None:
    told = list(write_stories(30, split="test", seed=2))
    n_left_out = sum(story.n_left_out for story in told)
    name = labelled_stories(30, split="test", seed=2).name
    assert name == (
        "30 generated stories, test split, seed 2 "
        f"({n_left_out} plain sentences left out, which training stories share)"
    )
    assert labelled_stories(30).name == "30 generated stories, train split, seed 0"


def test_there_are_stories_enough_for_the_rows() -> None:
    task = embedded_task("stories", n_rows=20_000, n_test_rows=20_000)
    for data in (task.train, task.test):
        words = re.findall(r"[^\W\d]+|\d\d|[^\w\s]", " ".join(data.inputs))
        assert 20_000 < len(words) - len(data.inputs) < 30_000


def test_tasks() -> None:
    task = embedded_task("stories", n_rows=3000, n_test_rows=1000, seed=2)
    assert len(task.train.inputs) > len(task.test.inputs) > 20
    assert list(task.test.inputs[:3]) == list(stories(3, split="test", seed=2))
    assert embedded_task("digits", 1, 1).module == "encoder.layer.2.mlp"


def test_bad_requests() -> None:
    for n, split in ((0, "train"), (1, "dev")):
        with pytest.raises(InputError):
            labelled_stories(n, split=split)
    with pytest.raises(InputError, match="digits, stories"):
        embedded_task("letters", 1, 1)
