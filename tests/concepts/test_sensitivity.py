"""TCAV, held to finite differences of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import lch_plugin as lch
from lch_plugin.concepts import TCAV, Concept, cav, difference_of_means, tcav, tcav_score
from tests.concepts.data import D, gaussians


def head() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 32), nn.Tanh(), nn.Linear(32, 4)).double()


def test_a_score_is_the_share_of_rising_logits() -> None:
    fn = head()
    x, labels, _, _ = gaussians(200)
    concept = cav(x, labels)
    k = one_hot(torch.tensor(2), 4).double()
    mu = lch.centroid(fn, x, cotangent=k)
    step = 1e-5 * concept.direction
    with torch.no_grad():
        slope = (fn(x + step) - fn(x - step))[:, 2] / 2e-5
    torch.testing.assert_close(mu @ concept.direction, slope, rtol=1e-6, atol=1e-9)
    share = float((slope > 0).double().mean())
    assert 0.05 < share < 0.95
    assert float(tcav_score(mu, concept.direction)) == share
    assert float(tcav_score(mu, -3 * concept.direction)) == pytest.approx(1 - share)


def planted(n: int = 60) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Centroids that mostly rise along the concept, and some that have nothing to do with it."""
    x, labels, _, gap = gaussians(2000)
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(n, D, dtype=torch.float64, generator=g)
    return x, labels, {"rises": noise + gap, "none": noise}


def test_a_planted_concept_is_found_and_no_other() -> None:
    x, labels, mu = planted()
    generator = torch.Generator().manual_seed(0)
    found = tcav(mu, x, labels, estimator=difference_of_means, n_random=99, generator=generator)
    assert found.scores[0] > 0.95
    assert found.p_values["rises"] < 0.1 < found.p_values["none"]
    assert found.random_scores.shape == (99, 2)
    assert found.corrected_p_values["rises"] == min(1, 2 * found.p_values["rises"])
    again = tcav(
        mu,
        x,
        labels,
        estimator=difference_of_means,
        n_random=99,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(found.random_scores, again.random_scores)


def test_p_values_hold_where_there_is_no_concept() -> None:
    """Of labels that are random themselves one in ten is at most 0.1."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, D, dtype=torch.float64, generator=g)
    mu = {"any": torch.randn(50, D, dtype=torch.float64, generator=g) + 0.3}
    small = 0

    def between_means(x: Tensor, index: Tensor) -> Concept:  # A quick one.
        return Concept((2 * index - 1).double() @ x, 0.0, 1.0, "difference of means")

    for _ in range(150):
        labels = (torch.randperm(40, generator=g) % 2).long()
        found = tcav(mu, x, labels, estimator=between_means, n_random=19, generator=g)
        small += found.p_values["any"] <= 0.1
    assert 2 <= small <= 28  # 15 on average; 3.5 standard deviations.


def test_examples_that_neither_rise_nor_fall_say_nothing() -> None:
    """As where a ReLU is off. Counted as falling they would hide a concept that all others have."""
    x, labels, mu = planted()
    rising = mu["rises"][mu["rises"] @ difference_of_means(x, labels).direction > 0]
    mixed = torch.cat([rising, torch.zeros_like(rising)])
    assert tcav_score(mixed, torch.ones(D)) + tcav_score(mixed, -torch.ones(D)) == 1
    found = tcav(
        {"mixed": mixed, "off": torch.zeros_like(mixed)},
        x,
        labels,
        estimator=difference_of_means,
        n_random=99,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.scores.tolist() == [0.75, 0.5]
    assert found.p_values["mixed"] < 0.1
    assert found.p_values["off"] == 1


def test_centroids_that_are_all_the_same_make_no_concept_significant() -> None:
    x, labels, _ = planted()
    found = tcav({"linear": x[:1].expand(50, -1) - 4}, x, labels, n_random=19)
    assert set(found.random_scores.flatten().tolist()) <= {0.0, 1.0}
    assert found.p_values["linear"] == 1


def test_p_values_are_two_sided_permutation_p_values() -> None:
    concept = Concept(torch.ones(1), 0.0, 1.0, "any")
    random = torch.tensor([[0.1], [0.9], [0.5], [0.85]], dtype=torch.float64)
    own = torch.tensor([0.9], dtype=torch.float64)
    assert TCAV(concept, ("a",), (20,), own, random).p_values == {"a": 3 / 5}
    assert TCAV(concept, ("a",), (20,), 1 - own, random).p_values == {"a": 3 / 5}


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    x, labels, mu = planted()
    rows = mu["rises"]
    for direction, said in [
        (torch.zeros(D), "zero"),
        (torch.ones(D + 1), r"\(7,\)"),
        (torch.full((D,), torch.nan), "finite"),
        (torch.ones(1, D), r"\(1, 6\)"),
    ]:
        with pytest.raises(lch.InputError, match=said):
            tcav_score(rows, direction)
    with pytest.raises(lch.InputError, match="mu"):
        tcav_score(rows / 0, torch.ones(D))
    with pytest.raises(lch.InputError, match="n_random=0"):
        tcav(mu, x, labels, n_random=0)
    with pytest.raises(lch.InputError, match="0 classes"):
        tcav({}, x, labels)
    with pytest.raises(lch.InputError, match="labels"):
        tcav(mu, x, labels[1:])
