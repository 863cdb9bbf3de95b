"""The examples: split, seeds, tokens and answers."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.tasks import (
    BEHAVIOURS,
    Example,
    combinations,
    examples,
    is_held_out,
    make_example,
    margin,
    pear_apple,
)
from lch_plugin.demo.vocabulary import article, plural
from lch_plugin.errors import InputError

PEAR_APPLE = "I climbed up the pear tree and picked a pear. I climbed up the apple tree and picked"
# What the split is decided by, written down a second time.
KEY_LENGTHS = {
    "a_an": 2,
    "ioi": 3,
    "agreement": 3,
    "greater_than": 3,
    "induction": 2,
    "pronoun": 2,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)


def test_the_six_behaviours() -> None:
    assert tuple(KEY_LENGTHS) == BEHAVIOURS


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_no_key_is_in_both_splits(behaviour: str) -> None:
    train, test = (
        {combination[: KEY_LENGTHS[behaviour]] for combination in combinations(behaviour, split)}
        for split in ("train", "test")
    )
    assert not train & test
    assert 0.05 < len(test) / len(train | test) < 0.15


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_examples_come_from_their_split(behaviour: str) -> None:
    for split in "train", "test":
        for example in examples(behaviour, 300, split=split):
            key = example.combination[: KEY_LENGTHS[behaviour]]
            assert is_held_out(behaviour, key) == (split == "test")


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_seed_decides_the_examples(behaviour: str) -> None:
    assert examples(behaviour, 50, seed=3) == examples(behaviour, 50, seed=3)
    assert examples(behaviour, 50, seed=3) != examples(behaviour, 50, seed=4)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_examples_are_of_distinct_combinations(behaviour: str) -> None:
    drawn = examples(behaviour, 500)
    assert len({example.combination for example in drawn}) == 500


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_tokens(behaviour: str, split: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for example in examples(behaviour, 200, split=split):
        assert example.prompt != example.corrupt
        assert len(tokenizer.encode(example.prompt)) == len(tokenizer.encode(example.corrupt))
        assert example.answers
        assert example.foils
        assert not set(example.answers) & set(example.foils)
        for word in example.answers + example.foils:
            assert len(tokenizer.encode(word)) == 1
        assert example.ending.startswith(example.answers)


def test_one_word_is_changed_in_the_corrupt_prompt() -> None:
    for behaviour in BEHAVIOURS:
        for example in examples(behaviour, 200):
            pairs = zip(example.prompt.split(), example.corrupt.split(), strict=True)
            assert sum(clean != corrupt for clean, corrupt in pairs) == 1


def test_pear_and_apple() -> None:
    example = pear_apple()
    assert example.prompt == PEAR_APPLE
    assert (example.answers, example.foils) == ((" an",), (" a",))
    assert example.combination in combinations("a_an", "test")


def test_answers_follow_from_the_prompt() -> None:
    def only(behaviour: str, *combination: str) -> Example:
        return make_example(behaviour, combination, random.Random(0))

    ioi = only("ioi", "when", "Mary", "John", "second")
    assert ioi.prompt.startswith("When Mary and John went to the")
    assert ", John gave" in ioi.prompt
    assert ", Mary gave" in ioi.corrupt
    assert (ioi.answers, ioi.foils) == ((" Mary",), (" John",))

    keys = only("agreement", "key", "to", "cabinet", "plural", "singular")
    assert keys.prompt == "The keys to the cabinet"
    assert keys.corrupt == "The key to the cabinet"
    assert (keys.answers, keys.foils) == ((" are", " were"), (" is", " was"))

    war = only("greater_than", "lasted", "war", "32")
    assert war.prompt.startswith("The war lasted from the year 1")
    assert war.answers == tuple(f"{year}" for year in range(33, 100))
    assert war.foils == tuple(f"{year:02d}" for year in range(33))

    induction = only("induction", "Zelkin", "Morvash", "liked")
    assert induction.prompt == "Everyone liked Zelkin Morvash. One day Zelkin"
    assert induction.answers == (" Morvash",)
    assert induction.corrupt.count("Morvash") == 0

    pronoun = only("pronoun", "without", "Mary", "John")
    assert pronoun.prompt == "Mary went home without John because"
    assert (pronoun.answers, pronoun.foils) == ((" she",), (" he",))


def test_the_distractor_disagrees() -> None:
    for example in examples("agreement", 200):
        assert example.combination[-2] != example.combination[-1]


def test_margin() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0], [4.0, 1.0, 3.0, 0.0]])
    difference = margin(logits, [0, 2], [1, 3])
    torch.testing.assert_close(difference, torch.tensor([-3.0, 3.0]))
    torch.testing.assert_close(margin(logits[1], [0, 2], [1, 3]), torch.tensor(3.0))


@pytest.mark.parametrize(
    ("behaviour", "n", "split"),
    [("rhyme", 1, "test"), ("ioi", 1, "dev"), ("ioi", 0, "test"), ("agreement", 10**6, "test")],
)
def test_bad_requests(behaviour: str, n: int, split: str) -> None:
    with pytest.raises(InputError):
        examples(behaviour, n, split=split)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("apple", "an"),
        ("pear", "a"),
        ("hour", "an"),
        ("heirloom", "an"),
        ("honest man", "an"),
        ("house", "a"),
        ("umbrella", "an"),
        ("ugly hat", "an"),
        ("unicorn", "a"),
        ("uniform", "a"),
        ("ukulele", "a"),
        ("useful lamp", "a"),
    ],
)
def test_article_goes_by_sound(phrase: str, expected: str) -> None:
    assert article(phrase) == expected


def test_plurals() -> None:
    singular = ["key", "box", "child", "shelf", "bench", "mouse"]
    assert list(map(plural, singular)) == [
        "keys",
        "boxes",
        "children",
        "shelves",
        "benches",
        "mice",
    ]
