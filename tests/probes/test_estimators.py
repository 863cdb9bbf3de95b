"""Probes against scikit-learn's own checks and estimators."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

import lch_plugin as lch
from lch_plugin import probes


def data(n: int = 80, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + y[:, None] * rng.normal(size=d), y


@parametrize_with_checks([probes.MassMeanProbe(), probes.MassMeanProbe(covariance=True)])
def test_scikit_learns_checks_hold(estimator, check, as_users_run: None) -> None:
    check(estimator)


def test_plain_it_is_the_nearest_of_two_means() -> None:
    X, y = data()
    probe = probes.MassMeanProbe().fit(X, y)
    np.testing.assert_allclose(probe.theta_, X[y == 1].mean(0) - X[y == 0].mean(0))
    Z, _ = data(seed=1)
    np.testing.assert_array_equal(probe.predict(Z), NearestCentroid().fit(X, y).predict(Z))


def test_with_the_covariance_it_is_the_discriminant_without_its_prior() -> None:
    X, y = data()
    Z, _ = data(seed=1)
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y)
    probe = probes.MassMeanProbe(covariance=True).fit(X, y)
    odds = np.log(y.mean() / (1 - y.mean()))
    assert odds != 0
    np.testing.assert_allclose(
        probe.decision_function(Z), lda.decision_function(Z) - odds, rtol=1e-8
    )
    plain = probes.MassMeanProbe().fit(X, y)
    assert (plain.predict(Z) != probe.predict(Z)).any()


def test_with_fewer_rows_than_coordinates_the_covariance_is_pseudo_inverted() -> None:
    X, y = data(n=12, d=40)
    coef = probes.MassMeanProbe(covariance=True).fit(X, y).coef_
    within = X - np.stack([X[y == side].mean(0) for side in (0, 1)])[y]
    # The direction lies in the span of what varies within the classes, and is of its size.
    _, s, rows = np.linalg.svd(within)
    kept = rows[: (s > 1e-9).sum()]
    np.testing.assert_allclose(coef @ kept.T @ kept, coef, rtol=1e-6)


def test_a_sparse_probe_reads_the_coordinates_whose_means_differ_most() -> None:
    X, y = data(d=5)
    X[:, 3] += 20 * y
    X[:, 1] -= 10 * y
    probe = probes.sparse_probe(probes.make_probe("logistic"), 2).fit(X, y)
    assert probe[0].get_support(indices=True).tolist() == [1, 3]
    assert probe.score(X, y) == 1.0


def test_coordinates_are_ranked_as_asked() -> None:
    """The widest apart, the widest apart for its spread, and one that only information knows."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    X = rng.normal(size=(200, 4)) * [100, 1, 1, 1]
    X[:, 0] += 60 * y
    X[:, 1] += 2 * y
    X[:, 2] = np.where(y, rng.choice([-3, 3], 200), 0) + 0.1 * rng.normal(size=200)
    first = {"mean-difference": 0, "f": 1, "mutual-information": 2}
    assert set(first) == set(probes.RANKINGS)
    for name, expected in first.items():
        probe = probes.sparse_probe(probes.make_probe("lda"), 1, rank_by=name).fit(X, y)
        assert probe[0].get_support(indices=True).tolist() == [expected]


def test_an_unknown_ranking_is_refused() -> None:
    with pytest.raises(
        lch.InputError, match=r"rank_by='l1' is not known\. There are mean-difference"
    ):
        probes.sparse_probe(probes.make_probe("lda"), 1, rank_by="l1")


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(lch.InputError, match=r"probe 'svm' is not known\. There are mass-mean"):
        probes.make_probe("svm")
