"""Pairs of prompts: how texts become batches, and what is refused."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from lch_plugin.circuits import Prompts, log_odds, logit_difference, prompts, solved
from lch_plugin.circuits.prompt_batches import single_token
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


def rows_of(values: list[float]) -> Metric:
    """A metric of a user's own, with a constant for each row of the whole batch."""
    weights = torch.tensor(values, dtype=torch.float64)
    return Metric(
        lambda logits: weights * logits[:, -1, 0] ** 3 + logits[:, -1, 1].log(), "own", -1
    )


def test_some_rows_of_a_batch_are_measured_as_in_it() -> None:
    """The metric and its gradient, of every way to name rows, and of rows of rows."""
    whole = Prompts(models.tokens(5), rows_of([1, 2, 3, 4, 5]), models.tokens(5, seed=1))
    logits = torch.rand(5, 7, 3, dtype=torch.float64, requires_grad=True)
    values = whole.measure(logits)
    for rows, expected in [
        (3, [3]),
        (-1, [4]),
        (slice(1, 4), [1, 2, 3]),
        ([4, 0], [4, 0]),
        (torch.tensor([2, 1]), [2, 1]),
    ]:
        some = whole[rows]
        assert torch.equal(some.clean, whole.clean[expected])
        assert torch.equal(some.corrupt, whole.corrupt[expected])
        found = some.measure(logits[expected])
        assert torch.equal(found, values[expected])
        weights = torch.arange(1.0, 1 + len(expected))
        slopes = [
            torch.autograd.grad((weights * of).sum(), logits, retain_graph=True)[0]
            for of in (found, values[expected])
        ]
        assert bool(slopes[0].isfinite().all())
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole[[4, 2, 0]][1:].measure(logits[[2, 0]]), values[[2, 0]])
    assert [len(one) for one in whole] == [1] * 5


def test_what_stands_in_for_other_rows_has_no_gradient() -> None:
    """Each row has a function of its own, which may not be defined for the logits of another."""
    least = torch.tensor([0.0, 9.0, 2.0])
    metric = Metric(lambda logits: (logits[:, -1, 0] - least).sqrt())
    logits = torch.full((1, 7, 3), 6.0, requires_grad=True)
    value = Prompts(models.tokens(3), metric)[2].measure(logits)
    assert value.tolist() == [2]
    (slope,) = torch.autograd.grad(value.sum(), logits)
    assert slope[0, -1].tolist() == [0.25, 0, 0]
    assert float(slope.sum()) == 0.25


@pytest.mark.usefixtures("as_users_run")
def test_batches_are_put_together_as_they_were() -> None:
    whole = Prompts(models.tokens(5), rows_of([1, 2, 3, 4, 5]), models.tokens(5, seed=1))
    logits = torch.rand(5, 7, 3, dtype=torch.float64)
    again = whole[[3, 1]] + whole[4] + whole[:1]
    order = [3, 1, 4, 0]
    assert torch.equal(again.clean, whole.clean[order])
    assert torch.equal(again.corrupt, whole.corrupt[order])
    assert torch.equal(again.measure(logits[order]), whole.measure(logits)[order])
    other = rows_of([1])
    for wrong, match in [
        (Prompts(models.tokens(1, pos=6), other), "of 7 and of 6 tokens"),
        (Prompts(models.tokens(1), other), "the other has none"),
        (Prompts(models.tokens(1), Metric(other.fn, "other", -1), models.tokens(1)), "are not one"),
        (Prompts(models.tokens(1), Metric(other.fn, "own", 0), models.tokens(1)), "are not one"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            whole + wrong
    for rows in ([], slice(5, 9), [0, 0], "a", 1.5):
        with pytest.raises(lch.InputError):
            whole[rows]
    with pytest.raises(IndexError):
        whole[5]
    scalar = Prompts(models.tokens(5), Metric(lambda y: y.sum(), "own", -1))
    with pytest.raises(lch.InputError, match="one number for each"):
        scalar[:2].measure(logits[:2])


def test_batches_show_themselves(model) -> None:
    (batch,) = prompts(model, "The keys to the cabinet", " are", " is", "The key to the cabinet")
    assert repr(batch) == "Prompts(1 of 6 tokens, logit_difference, with twins)"
    assert batch.texts == (("The keys to the cabinet", "The key to the cabinet"),)
    shown = batch._repr_html_()
    assert "The keys to the cabinet" in shown
    assert "The key to the cabinet" in shown
    long = "word " * 40 + "end"
    assert long in Prompts(batch.clean, batch.metric, None, ((long, None),))._repr_html_()
    odd = Prompts(batch.clean, batch.metric, batch.corrupt, (("<b>", "&"),))
    assert "&lt;b&gt;" in odd._repr_html_()
    assert repr(Prompts(batch.clean, batch.metric)) == "Prompts(1 of 6 tokens, logit_difference)"


def test_what_a_model_gets_right_is_kept(model) -> None:
    texts = list(TEXTS)
    answers, foils = [" are", " are", " she", " are"], [" is", " is", " he", " is"]
    batches = prompts(model, texts, answers, foils, list(TEXTS.values()))
    # The second is asked for the wrong number.
    assert {clean for b in solved(model, batches) for clean, _ in b.texts} == {
        text for i, text in enumerate(texts) if i != 1
    }
    wrong = prompts(model, texts[:1], [" is"], [" are"], list(TEXTS.values())[:1])
    with pytest.raises(lch.InputError, match=r"none of 1 prompts right \(mean metric -"):
        solved(model, wrong)
    same = prompts(model, texts[:1], [" are"], [" is"], texts[:1])
    with pytest.raises(lch.InputError, match="none of 1 prompts right"):
        solved(model, same)


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
    with pytest.raises(lch.InputError, match="1 texts for 2 prompts"):
        Prompts(models.tokens(), metric, texts=(("a", None),))
    with pytest.raises(lch.InputError, match=r"\(2, 7\) and corrupt ones \(2, 6\)"):
        Prompts(models.tokens(), logit_difference([[1]] * 2, [[2]] * 2), models.tokens(pos=6))


def test_a_word_that_the_tokenizer_does_not_know_is_no_answer() -> None:
    tiny = models.bridge("gpt2")
    tiny.tokenizer.add_special_tokens({"unk_token": "w7"})
    tiny.tokenizer.backend_tokenizer.model.unk_token = "w7"
    assert single_token(tiny, "w3") == 3
    with pytest.raises(lch.InputError, match="'an' is unknown to this tokenizer"):
        single_token(tiny, "an")
