"""Scores of features and statistics over seeds, against oracles from outside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from sklearn.metrics import pairwise_distances

from lch_plugin.saes.comparison.scores import (
    SPARSE,
    chance_agreement,
    label_agreement,
    majority_accuracy,
    mean_max_correlation,
    mean_max_cosine,
    probe_accuracy,
    probe_scores,
    sparse_probe_accuracies,
)
from lch_plugin.saes.comparison.statistics import correct, mean_and_sd, paired_test

LABELS = np.repeat(["x", "y", "z"], 40)


def feature_acts(seed: int, strength: float = 1.0, d_sae: int = 12) -> np.ndarray:
    """Sparse noise, and for each label two features of its own: 2 and 3 for x, 4 and 5 for y..."""
    rng = np.random.default_rng(seed)
    found = rng.random((len(LABELS), d_sae)) * (rng.random((len(LABELS), d_sae)) < 0.2)
    for i, label in enumerate("xyz"):
        found[label == LABELS, 2 + 2 * i : 4 + 2 * i] += strength
    return found.astype(np.float32)


def test_probes_find_what_is_there() -> None:
    train, test = feature_acts(0, strength=4), feature_acts(1, strength=4)
    scores = probe_scores(train, LABELS, test, LABELS)
    assert scores == {"probe": 1, "sparse_probe_1": 1, "sparse_probe_5": 1, "sparse_probe_10": 1}


@pytest.mark.parametrize("of_feature_acts", [True, False])
def test_probes_find_nothing_where_nothing_is(of_feature_acts: bool) -> None:
    """With labels in another order: chance, within four standard errors."""
    rng = np.random.default_rng(0)
    train = rng.normal(size=(600, 12)).astype(np.float32)
    test = rng.normal(size=(600, 12)).astype(np.float32)
    labels, test_labels = rng.permutation(np.tile(LABELS, 5)), rng.permutation(np.tile(LABELS, 5))
    full = probe_accuracy(train, labels, test, test_labels, of_feature_acts=of_feature_acts)
    sparse = sparse_probe_accuracies(
        train, labels, test, test_labels, of_feature_acts=of_feature_acts
    )[5]
    assert full == pytest.approx(1 / 3, abs=4 * np.sqrt(2 / 9 / 600))
    assert sparse == pytest.approx(1 / 2, abs=4 * np.sqrt(1 / 4 / 600))


def test_sparse_probes_choose_features_in_training() -> None:
    """A feature that tells the labels apart among the test items only is no use."""
    train, test = feature_acts(0, strength=0), feature_acts(1, strength=0)
    test[:, 0] = LABELS == "x"
    assert sparse_probe_accuracies(train, LABELS, test, LABELS)[1] < 0.7
    train[:, 0] = LABELS == "x"
    is_x = np.where(LABELS == "x", "x", "other")
    assert sparse_probe_accuracies(train, is_x, test, is_x)[1] == 1


def test_more_features_tell_more() -> None:
    """Eight features, each of which fires on an eighth of one label: one finds that much."""
    found = np.zeros((160, 16), dtype=np.float32)
    labels = np.repeat(["x", "y"], 80)
    for i in range(160):
        found[i, 8 * (i // 80) + i % 8] = 1
    scores = sparse_probe_accuracies(found, labels, found, labels)
    assert scores[1] == pytest.approx((1 / 8 + 1) / 2)
    assert scores[5] == pytest.approx((5 / 8 + 1) / 2)


def test_a_dead_dictionary_is_at_chance() -> None:
    dead = np.zeros((120, 8), dtype=np.float32)
    chance = dict.fromkeys(SPARSE, 0.5)
    assert sparse_probe_accuracies(dead, LABELS, dead, LABELS) == chance
    assert probe_accuracy(dead, LABELS, dead, LABELS) == pytest.approx(1 / 3)
    assert label_agreement(dead, LABELS, 5) == pytest.approx(chance_agreement(LABELS))
    assert mean_max_correlation(dead, feature_acts(0)) == 0
    assert mean_max_cosine(torch.zeros(0, 4), torch.randn(3, 4)) == 0


def test_the_majority_is_that_of_training() -> None:
    train, test = np.array(["x", "x", "y"]), np.array(["y", "y", "x", "y"])
    assert majority_accuracy(train, test) == 0.25


binary = arrays.arrays(np.float32, (14, 5), elements=st.sampled_from([0.0, 0.5, 2.0]))


@given(feature_acts=binary, n=st.integers(1, 13), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_neighbours_are_those_of_the_jaccard_index(
    feature_acts: np.ndarray, n: int, seed: int
) -> None:
    """Against scikit-learn's distances, averaged over all ways of breaking ties."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["x", "y", "z"], 14)
    active = feature_acts != 0
    distances = pairwise_distances(active, metric="jaccard")
    empty = ~active.any(1)
    distances[np.ix_(empty, empty)] = 1  # Nothing in common: scikit-learn says 0.
    np.fill_diagonal(distances, np.inf)
    shares = []
    for row, label in zip(distances, labels, strict=True):
        last = np.sort(row)[n - 1]
        nearer, tied = row < last - 1e-9, np.abs(row - last) <= 1e-9
        same = labels == label
        expected = (same & nearer).sum() + (same & tied).sum() / tied.sum() * (n - nearer.sum())
        shares.append(expected / n)
    # In double precision: tests of differences take it for granted.
    assert label_agreement(feature_acts, labels, n) == pytest.approx(np.mean(shares), abs=1e-13)
    order = rng.permutation(14)
    shuffled = label_agreement(feature_acts[order], labels[order], n)
    assert shuffled == pytest.approx(np.mean(shares), abs=1e-13)


def test_neighbours_in_chunks_are_the_same() -> None:
    """More items than one chunk holds."""
    rng = np.random.default_rng(0)
    found = (rng.random((1500, 20)) < 0.3).astype(np.float32)
    found[:, 0] = np.arange(1500) % 2
    found[:, 1] = 1 - found[:, 0]
    labels = np.where(found[:, 0] > 0, "x", "y")
    whole = label_agreement(found, labels, 5)
    assert whole > 0.6
    order = rng.permutation(1500)
    assert label_agreement(found[order], labels[order], 5) == pytest.approx(whole)


def test_agreement_by_chance() -> None:
    labels = np.array(["x", "x", "x", "y"])
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    assert chance_agreement(labels) == np.mean([labels[i] == labels[j] for i, j in pairs])


def test_dictionaries_in_another_order_are_the_same() -> None:
    W = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    scaled = W[torch.randperm(9)] * torch.rand(9, 1).add(0.1)
    assert mean_max_cosine(W, scaled) == pytest.approx(1)
    # A direction and its opposite are two features.
    assert mean_max_cosine(torch.eye(3), -torch.eye(3)) == 0


def test_both_directions_count() -> None:
    """All of the small dictionary is in the large one, and half of the large one in the small."""
    assert mean_max_cosine(torch.eye(4)[:2], torch.eye(4)) == pytest.approx((1 + 0.5) / 2)


def test_correlations_are_numpys() -> None:
    a, b = feature_acts(0), feature_acts(1, d_sae=9)
    b[:, 3] = 0.7  # Does not vary.
    varying = np.delete(b, 3, axis=1)
    found = np.corrcoef(a.T, varying.T)[: a.shape[1], a.shape[1] :]
    expected = (found.max(1).mean() + found.max(0).mean()) / 2
    assert mean_max_correlation(a, b) == pytest.approx(expected)
    assert mean_max_correlation(3 * a, varying) == pytest.approx(expected, abs=1e-6)


def test_features_that_differ_by_rounding_are_like_no_other() -> None:
    """Of a constant feature the means over items of different lengths vary by their rounding."""
    a, b = feature_acts(0), feature_acts(1, d_sae=9)
    tenth = np.float32(0.1)
    constant = np.where(np.arange(len(a)) % 2, tenth, np.nextafter(tenth, np.float32(1)))
    with_constant = np.column_stack([a, constant])
    assert mean_max_correlation(with_constant, b) == mean_max_correlation(a, b)


def test_paired_tests_are_paired() -> None:
    """A difference that is small beside the spread between seeds, and the same for every seed."""
    first, second = [0.9, 0.5, 0.7], [0.88, 0.49, 0.68]
    found = paired_test(first, second)
    differences = np.subtract(first, second)
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(3)
    assert found.n == 3
    assert found.difference == pytest.approx(mean)
    assert found.p_value == pytest.approx(2 * stats.t.sf(mean / error, df=2))
    half = stats.t.ppf(0.975, df=2) * error
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert found.p_value is not None
    assert found.p_value < 0.05 < stats.ttest_ind(first, second).pvalue


def test_differences_without_spread_have_no_test() -> None:
    for second in ([8.0, 8.0, 8.0], [7.0, 7.0, 7.0]):
        found = paired_test([8.0, 8.0, 8.0], second)
        assert found.difference == 8 - second[0]
        assert found.low is found.high is found.p_value is None
        assert found.reason is not None
    assert paired_test([0.1, math.nan], [0.1, 0.2]).p_value is None
    assert paired_test([0.1, math.nan], [0.1, 0.2]).reason == "a score is not finite"


@given(
    first=st.lists(st.floats(0.01, 1e3), min_size=2, max_size=8),
    shift=st.floats(-1e3, 1e3),
    n=st.integers(2, 30),
)
@settings(max_examples=200, deadline=None)
def test_differences_that_are_the_same_but_for_rounding_have_no_test(
    first: list[float], shift: float, n: int
) -> None:
    """Nor an interval of no width, also where scores are means of several terms."""
    noisy = [sum([x / n] * n) for x in first]
    second = [x + shift for x in first]
    found = paired_test(noisy, second)
    assert found.low is found.high is found.p_value is None
    assert found.reason == "the difference is the same for every seed, but for rounding"
    assert found.difference == pytest.approx(-shift, abs=1e-11)


def test_small_differences_with_a_spread_of_their_own_have_a_test() -> None:
    found = paired_test([0.5, 0.6, 0.7], [0.5 - 1e-9, 0.6 - 2e-9, 0.7 - 3e-9])
    assert found.reason is None
    assert found.p_value == pytest.approx(stats.ttest_1samp([1, 2, 3], 0).pvalue, rel=1e-5)


def test_tests_are_corrected_for_all_that_were_made() -> None:
    pairs = [([3.0, 4.0, 6.0], [1.0, 1.0, 2.0]), ([1.0, 1.0], [1.0, 1.0]), ([1.0, 5.0], [2.0, 3.0])]
    tests = [paired_test(*pair).to_dict() for pair in pairs]
    assert correct(tests) == 2
    (small, none, large) = tests
    assert small["p_corrected"] == 2 * small["p_value"]
    assert large["p_corrected"] == large["p_value"] > small["p_value"]
    assert none["p_corrected"] is none["p_value"] is None


def test_the_spread_is_that_of_a_sample() -> None:
    assert mean_and_sd([1.0, 2.0, 3.0]) == {"mean": 2, "sd": 1}
