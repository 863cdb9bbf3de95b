"""What is measured: the formulas, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lch_plugin as lch
from lch_plugin.circuits import kl_divergence, log_probability, logit_difference

D_VOCAB = 12
LOGITS = torch.randn(2, 5, D_VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = st.sets(st.integers(0, D_VOCAB - 1), min_size=2, max_size=D_VOCAB)


def test_one_answer_and_one_foil_give_their_logit_difference() -> None:
    value = logit_difference([[3], [4]], [[5], [6]], position=2).fn(LOGITS)
    expected = [LOGITS[0, 2, 3] - LOGITS[0, 2, 5], LOGITS[1, 2, 4] - LOGITS[1, 2, 6]]
    torch.testing.assert_close(value, torch.stack(expected))


@settings(max_examples=25, deadline=None)
@given(tokens=st.tuples(TOKENS, TOKENS), data=st.data())
def test_several_answers_and_foils_are_compared_by_probability(tokens, data) -> None:
    """Also where prompts have different numbers of them: what pads one is not counted."""
    rights, wrongs = [], []
    for drawn in tokens:
        n = data.draw(st.integers(1, len(drawn) - 1))
        rights.append(sorted(drawn)[:n])
        wrongs.append(sorted(drawn)[n:])
    value = logit_difference(rights, wrongs).fn(LOGITS)
    share = log_probability(rights).fn(LOGITS)
    p = LOGITS[:, -1].softmax(-1)
    for i, (right, wrong) in enumerate(zip(rights, wrongs, strict=True)):
        torch.testing.assert_close(value[i], (p[i, right].sum() / p[i, wrong].sum()).log())
        torch.testing.assert_close(share[i], p[i, right].sum().log())


def test_a_token_named_twice_counts_once() -> None:
    twice = logit_difference([[3, 3], [4]], [[5], [6, 7, 6]]).fn(LOGITS)
    assert torch.equal(twice, logit_difference([[3], [4]], [[5], [6, 7]]).fn(LOGITS))
    share = log_probability([[3, 3]] * 2).fn(LOGITS)
    assert torch.equal(share, log_probability([[3]] * 2).fn(LOGITS))


def test_kl_divergence_is_torchs() -> None:
    other = LOGITS.flip(0)
    value = kl_divergence(other, position=1).fn(LOGITS)
    expected = torch.nn.functional.kl_div(
        LOGITS[:, 1].log_softmax(-1), other[:, 1].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(kl_divergence(LOGITS).fn(LOGITS), torch.zeros(2).double())


def test_a_reference_is_not_differentiated() -> None:
    reference = LOGITS.clone().requires_grad_()
    value = kl_divergence(reference).fn(LOGITS.flip(0))
    assert not value.requires_grad


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    for make, match in [
        (lambda: logit_difference([[1]], [[2], [3]]), "1 prompts have answers and 2 have foils"),
        (lambda: logit_difference([[1, 2]], [[2, 1, 3]]), r"\[1, 2\] are both answer and foil"),
        (lambda: logit_difference([[1], []], [[2], [3]]), "at least one answer"),
        (lambda: logit_difference([[1]], [[]]), "at least one foil"),
        (lambda: log_probability([]), "at least one answer"),
        (lambda: logit_difference(3, 4), "at least one answer"),  # type: ignore[arg-type]
        (lambda: logit_difference([3], [4]), "list of token ids for its answers.*got 3"),  # type: ignore[list-item]
        (lambda: log_probability([[1.5]]), r"got \[1\.5\]"),  # type: ignore[list-item]
        (lambda: kl_divergence(LOGITS[:1]).fn(LOGITS), r"reference has \(1, 12\).*gave \(2, 12\)"),
        (lambda: kl_divergence(LOGITS[..., 1:]).fn(LOGITS), r"reference has \(2, 11\)"),
        (lambda: log_probability([[1]] * 3).fn(LOGITS), "made for 3 prompts and got 2"),
        (lambda: log_probability([[1]] * 2, position=5).fn(LOGITS), "position=5.*0 to 4"),
        (lambda: log_probability([[1]] * 2, position=-6).fn(LOGITS), "position=-6"),
        (lambda: kl_divergence(LOGITS, position=7), "position=7"),
        (lambda: log_probability([[1], [D_VOCAB]]).fn(LOGITS), r"\[12\] leave the model's voc"),
        (lambda: log_probability([[1], [-1]]).fn(LOGITS), r"\[-1\] leave"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            make()
