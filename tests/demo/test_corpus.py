"""The stories: seeds, split, spelling and tokens."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from transformers import AutoTokenizer

from lch_plugin.demo import DEMO_MODEL_DIR, vocabulary
from lch_plugin.demo.corpus import stories, word_lists, write_stories, write_story
from lch_plugin.demo.tasks import BEHAVIOURS, combinations, examples
from lch_plugin.errors import InputError


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(stories(5000, seed=1))


def test_seed_decides_the_text() -> None:
    assert list(stories(50, seed=2)) == list(stories(50, seed=2))
    assert list(stories(50, seed=2)) != list(stories(50, seed=3))
    assert list(stories(50, seed=2))[:20] == list(stories(20, seed=2))


@pytest.mark.parametrize("split", ["train", "test"])
def test_stories_are_made_of_their_split(split: str) -> None:
    rng = random.Random(0)
    used = {pair for _ in range(3000) for pair in write_story(rng, split).combinations}
    allowed = {
        (behaviour, combination)
        for behaviour in BEHAVIOURS
        for combination in combinations(behaviour, split)
    }
    assert used <= allowed
    assert {behaviour for behaviour, _ in used} == set(BEHAVIOURS)


def test_no_held_out_prompt_is_in_a_training_story(texts: list[str]) -> None:
    everything = "\n".join(texts)
    for behaviour in BEHAVIOURS:
        for example in examples(behaviour, 200):
            assert example.prompt not in everything


@pytest.mark.slow
def test_no_passage_of_a_held_out_story_is_in_a_training_story() -> None:
    """Nor within one: "Paul was cold because he was late" is in "Unlike Mary, Paul was cold..."."""
    training = "\n".join(stories(20_000, seed=0))
    told = list(write_stories(500, split="test", seed=0))
    passages = {text for story in told for _, text in story.passages}
    assert len(passages) > 700
    assert not {text for text in passages if text in training}


def test_held_out_stories_tell_examples_alone() -> None:
    rng = random.Random(0)
    for split, plain in (("train", True), ("test", False)):
        told = [write_story(rng, split) for _ in range(200)]
        assert any(kind is None for story in told for kind, _ in story.passages) == plain
        assert any(story.n_left_out for story in told) != plain
        for story in told:
            examples_told = [kind for kind, _ in story.passages if kind]
            assert examples_told == [behaviour for behaviour, _ in story.combinations]
            assert story.text == " ".join(text for _, text in story.passages)


def test_no_held_out_noun_is_in_its_template(texts: list[str]) -> None:
    """The (template, noun) pairs, read from the text of the sentence that asks for the article."""
    everything = "\n".join(texts)
    for example in examples("a_an", 2000):
        asking = example.prompt.split(". ")[1]
        _, action = asking.split(" ", maxsplit=1)
        assert action not in everything


def test_no_held_out_pair_of_invented_words_occurs(texts: list[str]) -> None:
    invented = set(vocabulary.INVENTED)
    held_out = {combination[:2] for combination in combinations("induction", "test")}
    for text in [*texts, *word_lists(500, seed=1)]:
        pairs = set(itertools.pairwise(re.findall(r"\w+|[^\w\s]", text)))
        assert not pairs & held_out
    assert any(invented & set(text.split()) for text in texts)


def test_stories_have_two_to_ten_sentences(texts: list[str]) -> None:
    for text in texts:
        assert 2 <= len(re.findall(r"\.(?= |$)", text)) <= 10
        assert text.endswith(".")


def test_articles_agree_with_the_next_sound(texts: list[str]) -> None:
    for text in texts:
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
            vowel = word[0] in "aeiou" or word in {"hour", "heirloom", "hourglass", "honest"}
            like_you = word in {"unicorn", "uniform", "unicycle", "ukulele", "useful"}
            assert article.lower() == ("an" if vowel and not like_you else "a"), (article, word)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_word_is_one_token(split: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    for text in stories(2000, split=split, seed=5):
        pieces = re.findall(r" ?[^\W\d]+| ?\d\d| ?[^\w\s]", text)
        assert "".join(pieces) == text
        assert len(tokenizer.encode(text)) == len(pieces)


def test_any_text_can_be_encoded() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    for text in "Hello, wörld!\n\n  7 × 19 = 133\t", "数学 🙂", "<|endoftext|>Mary":
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 1732")) == ["Ġ17", "32"]


def test_bad_requests() -> None:
    with pytest.raises(InputError):
        stories(0)
    with pytest.raises(InputError):
        stories(1, split="dev")
