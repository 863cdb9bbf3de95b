"""The tasks: on the embedded model, and with tokenizers that read their texts otherwise."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lch_plugin as lch
from lch_plugin.circuits import TASKS, task, task_templates
from lch_plugin.circuits.tasks import _CAPITALS
from lch_plugin.demo import tasks as generator
from lch_plugin.demo import vocabulary

# What a tokenizer of English might have seen: names and articles, and no invented word.
ENGLISH = [
    f"When {name} and {other} went to the store, {name} gave an apple to {other}. "
    f"Everyone liked {name}. One day {other} came to a garden."
    for name, other in zip(vocabulary.NAMES, reversed(vocabulary.NAMES), strict=True)
]


@pytest.fixture(scope="module")
def model():
    return lch.load_demo_model()


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> TransformerBridge:
    """A model with a byte-level BPE of its own, as GPT-2's, trained on a few sentences."""
    return bridge_of(ENGLISH, tmp_path_factory.mktemp("english"))


def bridge_of(texts: list[str], directory: Any) -> TransformerBridge:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(3 * texts, trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=128)
    config.architectures = ["GPT2LMHeadModel"]
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=GPT2LMHeadModel(config).eval(), tokenizer=tokenizer, device="cpu"
    )


def pairs(model: TransformerBridge, name: str, n: int, **options: Any) -> list[tuple[Any, Any]]:
    """Clean and corrupt prompts as token ids."""
    return [
        (tuple(clean.tolist()), tuple(corrupt.tolist()))
        for batch in task(model, name, n, **options)
        for clean, corrupt in zip(batch.clean, batch.corrupt, strict=True)
    ]


def texts(model: TransformerBridge, name: str, n: int, **options: Any) -> list[tuple[str, str]]:
    """Clean and corrupt prompts as they are read."""
    return [
        (model.to_string(list(clean)), model.to_string(list(corrupt)))
        for clean, corrupt in pairs(model, name, n, **options)
    ]


EMBEDDED = [name for name in TASKS if name != "capitals"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_model_tells_clean_from_corrupt(model, name: str) -> None:
    clean, corrupt = [], []
    with torch.no_grad():
        for batch in task(model, name, 20):
            assert batch.corrupt is not None
            clean.append(batch.measure(model(batch.clean)))
            corrupt.append(batch.measure(model(batch.corrupt)))
    assert float((torch.cat(clean) > 0).double().mean()) > 0.9
    assert float((torch.cat(clean) > 1 + torch.cat(corrupt)).double().mean()) > 0.9


@pytest.mark.parametrize("name", EMBEDDED)
def test_splits_share_no_example_and_seeds_choose(model, name: str) -> None:
    train, test = (pairs(model, name, 40, split=split) for split in ("train", "test"))
    assert len(train) == len(test) == 40
    assert not set(train) & set(test)
    assert pairs(model, name, 40, split="train") == train
    assert pairs(model, name, 40, split="train", seed=1) != train


def test_the_texts_are_those_of_the_generator(model) -> None:
    expected = {e.prompt for e in generator.examples("ioi", 10, split="train", seed=3)}
    found = texts(model, "ioi", 10, split="train", seed=3)
    assert {clean.removeprefix("<|endoftext|>") for clean, _ in found} == expected


def test_names_stand_for_invented_words_that_are_several_tokens(english) -> None:
    train, test = (texts(english, "induction", 30, split=split) for split in ("train", "test"))
    for clean, corrupt in (*train, *test):
        first, second, other = (
            clean.split()[2],
            clean.split()[3].rstrip("."),
            corrupt.split()[3].rstrip("."),
        )
        assert {first, second, other} <= set(vocabulary.NAMES)
        assert len({first, second, other}) == 3
        assert clean.endswith(f"Everyone liked {first} {second}. One day {first}")
        assert corrupt == clean.replace(second, other)
        held_out = generator.is_held_out("induction", (first, second))
        assert held_out == ((clean, corrupt) in test)
    assert len({clean for clean, _ in train}) == len(train) == 30
    assert texts(english, "induction", 30, split="train") == train
    assert texts(english, "induction", 30, split="train", seed=1) != train


@pytest.mark.parametrize("name", ["an", "ioi"])
def test_another_tokenizer_is_given_what_it_reads(english, name: str) -> None:
    for batch in task(english, name, 20):
        assert batch.corrupt is not None
        changed = (batch.clean != batch.corrupt).sum(-1)
        assert bool((changed >= 1).all())
        assert len(batch.measure(english(batch.clean).detach())) == len(batch)


def test_a_tokenizer_of_digits_is_asked_for_the_decade(english) -> None:
    """Two digits are two tokens to it."""
    (first, *_) = task(english, "greater_than", 20)
    for (clean, corrupt), row in zip(first.texts, range(len(first)), strict=True):
        century, year = clean[-2:], next(w for w in clean.replace("?", " ").split() if len(w) == 4)
        assert year.startswith(century)
        assert corrupt == clean.replace(year, f"{century}0{year[3]}")
        logits = torch.zeros(1, first.clean.shape[1], english.cfg.d_vocab)
        decade = int(year[2])
        for digit in range(10):
            logits[..., english.to_single_token(str(digit))] = digit > decade
        # Digits above the decade are answers, those below foils, and the decade itself is neither.
        assert float(first[row].measure(logits)) == 1


def test_capitals_are_asked_of_tokenizers_that_know_them(tmp_path: Any) -> None:
    texts_ = [f"The capital of {c} is the city of {d}." for c, d in _CAPITALS.items()]
    model = bridge_of(texts_ * 2, tmp_path)
    train, test = (texts(model, "capitals", 60, split=split) for split in ("train", "test"))
    # Not the other way round either.
    assert not {frozenset(pair) for pair in train} & {frozenset(pair) for pair in test}
    (batch, *_) = task(model, "capitals", 60)
    for row, pair in enumerate(batch.texts):
        country, other = (next(c for c in _CAPITALS if c in text) for text in pair)
        logits = torch.zeros(1, 1, model.cfg.d_vocab)
        logits[..., model.to_single_token(f" {_CAPITALS[country]}")] = 3
        logits[..., model.to_single_token(f" {_CAPITALS[other]}")] = 1
        assert float(batch[row].measure(logits)) == 2


def test_templates_are_reported_one_by_one(model) -> None:
    found = task_templates(model, "an", 30)
    assert sum(one.n for one in found) == 30
    batches = task(model, "an", 30, split="train")
    with torch.no_grad():
        clean = torch.cat([batch.measure(model(batch.clean)) for batch in batches])
        twins = torch.cat([batch.measure(model(batch.corrupt)) for batch in batches])
    for values, field in ((clean, "clean"), (twins, "corrupt"), (100.0 * (clean > 0), "accuracy")):
        mean = sum(one.n * getattr(one, field) for one in found) / 30
        assert mean * (100 if field == "accuracy" else 1) == pytest.approx(float(values.mean()))
    assert {one.example for one in found} <= {
        clean for batch in batches for clean, _ in batch.texts
    }
    assert {one.readable for one in found} == {1}


def test_templates_say_what_share_of_their_pairs_a_tokenizer_reads(english) -> None:
    lengths = defaultdict(list)
    for example in generator.examples("a_an", 100, split="train"):
        clean, corrupt = map(english.to_tokens, (example.prompt, example.corrupt))
        lengths[example.combination[0]].append(clean.shape == corrupt.shape)
    found = {one.template: one.readable for one in task_templates(english, "an", 20)}
    assert found == {name: pytest.approx(np.mean(lengths[name])) for name in found}
    assert min(found.values()) < 0.5


def test_without_names_there_is_no_induction(tmp_path: Any) -> None:
    numbers = bridge_of(["one two three four"], tmp_path)
    with pytest.raises(lch.InputError, match="0 of 5 pairs of the task 'induction'"):
        task(numbers, "induction", 5)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused(model, english) -> None:
    with pytest.raises(lch.InputError, match="no task is called 'rhyme'"):
        task(model, "rhyme")
    with pytest.raises(
        lch.InputError, match=r"0 of 60 pairs of the task 'capitals' .* Take another"
    ):
        task(model, "capitals")
    for reader, name in ((model, "an"), (model, "induction"), (english, "induction")):
        with pytest.raises(lch.InputError, match="no split is called 'validation'"):
            task(reader, name, split="validation")
        for n in (0, -1):
            with pytest.raises(lch.InputError, match=f"n={n}: a task has at least one"):
                task(reader, name, n)
    with pytest.raises(lch.InputError, match="1000000"):
        task(model, "an", 1_000_000)
