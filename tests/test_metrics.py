"""What is measured: the formulas, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lch_plugin as lch
from lch_plugin.circuits import kl_divergence, log_odds, log_probability, logit_difference

D_VOCAB = 12
LOGITS = torch.randn(2, 5, D_VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = st.sets(st.integers(0, D_VOCAB - 1), min_size=2, max_size=D_VOCAB)


@pytest.mark.parametrize("metric", [logit_difference, log_odds])
def test_one_answer_and_one_foil_give_their_logit_difference(metric) -> None:
    value = metric([[3], [4]], [[5], [6]], position=2).of(LOGITS)
    expected = [LOGITS[0, 2, 3] - LOGITS[0, 2, 5], LOGITS[1, 2, 4] - LOGITS[1, 2, 6]]
    torch.testing.assert_close(value, torch.stack(expected))


@settings(max_examples=25, deadline=None)
@given(tokens=st.tuples(TOKENS, TOKENS), data=st.data())
def test_several_answers_and_foils_are_compared_by_mean_or_by_probability(tokens, data) -> None:
    """Also where prompts have different numbers of them: what pads one is not counted."""
    rights, wrongs = [], []
    for drawn in tokens:
        n = data.draw(st.integers(1, len(drawn) - 1))
        rights.append(sorted(drawn)[:n])
        wrongs.append(sorted(drawn)[n:])
    difference = logit_difference(rights, wrongs).of(LOGITS)
    odds = log_odds(rights, wrongs).of(LOGITS)
    share = log_probability(rights).of(LOGITS)
    at, p = LOGITS[:, -1], LOGITS[:, -1].softmax(-1)
    for i, (right, wrong) in enumerate(zip(rights, wrongs, strict=True)):
        torch.testing.assert_close(difference[i], at[i, right].mean() - at[i, wrong].mean())
        torch.testing.assert_close(odds[i], (p[i, right].sum() / p[i, wrong].sum()).log())
        torch.testing.assert_close(share[i], p[i, right].sum().log())


def test_the_logit_difference_is_one_function_of_tokens_for_all_prompts_or_for_each() -> None:
    assert lch.circuits.logit_difference is lch.cotangents.logit_difference
    expected = logit_difference([[3], [3]], [[5], [5]]).of(LOGITS)
    for answers, foils in ((3, 5), ([[3], [3]], 5), (3, [[5], [5]])):
        metric = logit_difference(answers, foils)
        torch.testing.assert_close(metric.of(LOGITS), expected)
    assert logit_difference(3, 5).name == "3_minus_5"


def test_a_token_named_twice_counts_once() -> None:
    for metric in (logit_difference, log_odds):
        twice = metric([[3, 3], [4]], [[5], [6, 7, 6]]).of(LOGITS)
        assert torch.equal(twice, metric([[3], [4]], [[5], [6, 7]]).of(LOGITS))
    share = log_probability([[3, 3]] * 2).of(LOGITS)
    assert torch.equal(share, log_probability([[3]] * 2).of(LOGITS))


def test_the_logit_difference_is_linear_in_the_logits() -> None:
    one, other = LOGITS, LOGITS.flip(1)
    several = ([[3, 4], [5]], [[6], [7, 8, 9]])
    mixed = 3 * one - 0.5 * other
    for metric, linear in ((logit_difference(*several), True), (log_odds(*several), False)):
        apart = 3 * metric.fn(one) - 0.5 * metric.fn(other)
        assert torch.allclose(metric.fn(mixed), apart, rtol=1e-12, atol=1e-12) == linear


def test_kl_divergence_is_torchs() -> None:
    other = LOGITS.flip(0)
    value = kl_divergence(other, position=1).of(LOGITS)
    expected = torch.nn.functional.kl_div(
        LOGITS[:, 1].log_softmax(-1), other[:, 1].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(kl_divergence(LOGITS).of(LOGITS), torch.zeros(2).double())


def test_a_reference_is_not_differentiated() -> None:
    reference = LOGITS.clone().requires_grad_()
    value = kl_divergence(reference).of(LOGITS.flip(0))
    assert not value.requires_grad


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    for make, match in [
        (lambda: logit_difference([[1]], [[2], [3]]), "1 prompts have answers and 2 have foils"),
        (lambda: log_odds([[1]], [[2], [3]]), "1 prompts have answers and 2 have foils"),
        (lambda: logit_difference([[1, 2]], [[2, 1, 3]]), r"\[1, 2\] are both answer and foil"),
        (lambda: logit_difference([[1], []], [[2], [3]]), "at least one answer"),
        (lambda: logit_difference([[1]], [[]]), "at least one foil"),
        (lambda: logit_difference([[1]], [[D_VOCAB]]).of(LOGITS[:1]), r"\[12\] leave"),
        (lambda: log_probability([]), "at least one answer"),
        (lambda: log_odds(3, 4), "at least one answer"),  # type: ignore[arg-type]
        (lambda: logit_difference(3, 3), "do not differ"),
        (lambda: logit_difference([3], [4]), "list of token ids for its answers.*got 3"),  # type: ignore[list-item]
        (lambda: log_probability([[1.5]]), r"got \[1\.5\]"),  # type: ignore[list-item]
        (lambda: kl_divergence(LOGITS[:1]).of(LOGITS), r"reference has \(1, 12\).*gave \(2, 12\)"),
        (lambda: kl_divergence(LOGITS[..., 1:]).of(LOGITS), r"reference has \(2, 11\)"),
        (lambda: log_probability([[1]] * 3).of(LOGITS), "made for 3 prompts and got 2"),
        (lambda: log_probability([[1]] * 2, position=5).of(LOGITS), "position 5 .* 5 tokens"),
        (lambda: log_probability([[1]] * 2, position=-6).of(LOGITS), "position -6"),
        (lambda: kl_divergence(LOGITS, position=7), "position 7"),
        (lambda: log_probability([[1], [D_VOCAB]]).of(LOGITS), r"\[12\] leave the model's voc"),
        (lambda: log_probability([[1], [-1]]).of(LOGITS), r"\[-1\] leave"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            make()
