"""Pairs of prompts: how texts become batches, and what is refused."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from lch_plugin.circuits import Prompts, log_odds, logit_difference, prompts
from lch_plugin.circuits.prompts import single_token
from lch_plugin.cotangents import Metric
from tests import models


@pytest.fixture(scope="module")
def model():
    return lch.load_demo_model()


TEXTS = {
    "The keys to the cabinet": "The key to the cabinet",
    "The dog near the tables": "The dogs near the tables",
    "Mary was tired because": "John was tired because",
    "The cats behind the wall": "The cat behind the wall",
}


@pytest.mark.parametrize("metric", [logit_difference, log_odds])
def test_batches_have_one_length_and_keep_pairs_and_answers_together(model, metric) -> None:
    answers = [[" are"], [" is"], [" she"], [" are", " were"]]
    foils = [[" is"], [" are"], [" he"], [" is"]]
    twins = list(TEXTS.values())
    batches = prompts(model, list(TEXTS), answers, foils, twins, metric=metric, batch_size=2)
    assert [len(batch) for batch in batches] == [2, 1, 1]
    seen = set()
    with torch.no_grad():
        for batch in batches:
            values = batch.measure(model(batch.clean))
            assert batch.corrupt is not None
            rows = zip(batch.clean, batch.corrupt, values, strict=True)
            for clean, corrupt, value in rows:
                text = model.to_string(clean[1:])
                assert model.to_string(corrupt[1:]) == TEXTS[text]
                i = list(TEXTS).index(text)
                logits = model(clean[None])[0, -1]
                right, wrong = (
                    [single_token(model, word) for word in side[i]] for side in (answers, foils)
                )
                one = torch.Tensor.mean if metric is logit_difference else torch.logsumexp
                expected = one(logits[right], -1) - one(logits[wrong], -1)
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
                seen.add(text)
    assert seen == set(TEXTS)


def test_one_text_one_answer_and_no_twin(model) -> None:
    (batch,) = prompts(model, "The keys to the cabinet", " are", " is")
    assert batch.corrupt is None
    assert batch.metric.name == "logit_difference"
    assert len(batch) == 1
    assert torch.equal(batch.clean, model.to_tokens("The keys to the cabinet"))


def test_metrics_are_computed_at_least_in_float32() -> None:
    seen = []
    metric = Metric(lambda logits: seen.append(logits.dtype) or logits[:, -1, 0])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        Prompts(models.tokens(), metric).measure(torch.zeros(2, 7, 3, dtype=dtype))
    assert seen == [torch.float32, torch.float32, torch.float64]


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused(model) -> None:
    keys, key = "The keys to the cabinet", "The key to the cabinet"
    for args, match in [
        (([keys], [" are"], [" is"], ["The keys to the old cabinet"]), "equal lengths"),
        (([keys, keys], [" are"], " is"), "2 clean prompts, 2 corrupt ones, 1 answers"),
        (([keys], " are", " is", [key, key]), "1 clean prompts, 2 corrupt ones"),
        (([], [], []), "at least one"),
        (([keys], " are not", " is"), r"' are not' is 2 tokens .* \[' are', ' not'\]"),
        (([keys], " are", ""), "'' is 0 tokens"),
        (([keys], [[]], " is"), "at least one answer"),
        (([keys], " are", " are"), "both answer and foil"),
        ((["the " * 200], " are", " is"), "context of 128"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            prompts(model, *args)
    with pytest.raises(lch.InputError, match="batch_size=0"):
        prompts(model, [keys], " are", " is", batch_size=0)
    metric = logit_difference([[1]], [[2]])
    for clean, match in [
        (keys, "got str. For texts"),
        (models.tokens()[0], r"got \(7,\)"),
        (models.tokens()[:0], r"got \(0, 7\)"),
        (models.tokens()[:, :0], r"got \(2, 0\)"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            Prompts(clean, metric)  # type: ignore[arg-type]
    with pytest.raises(lch.InputError, match="metric is a function"):
        Prompts(models.tokens(), metric.fn)  # type: ignore[arg-type]
    with pytest.raises(lch.InputError, match=r"\(2, 7\) and corrupt ones \(2, 6\)"):
        Prompts(models.tokens(), logit_difference([[1]] * 2, [[2]] * 2), models.tokens(pos=6))


def test_a_word_that_the_tokenizer_does_not_know_is_no_answer() -> None:
    tiny = models.bridge("gpt2")
    tiny.tokenizer.add_special_tokens({"unk_token": "w7"})
    tiny.tokenizer.backend_tokenizer.model.unk_token = "w7"
    assert single_token(tiny, "w3") == 3
    with pytest.raises(lch.InputError, match="'an' is unknown to this tokenizer"):
        single_token(tiny, "an")
