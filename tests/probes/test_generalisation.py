"""What is trained on is not tested on, and the control knows no labels."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import VotingClassifier
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

import lch_plugin as lch
from lch_plugin import probes


def sets(shift: float, n: int = 200) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two sets with the same direction, and one with the opposite."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    signs = {"a": 1, "b": 1, "opposite": -1}
    values = {
        k: rng.normal(size=(n, 5)) + s * shift * (2 * y - 1)[:, None] for k, s in signs.items()
    }
    return values, dict.fromkeys(values, y)


def test_a_direction_that_is_shared_generalises_and_one_that_is_opposite_does_not() -> None:
    found = probes.generalise(*sets(3.0), probes.make_probe("mass-mean"), train=["b", "opposite"])
    assert found.test == ("b", "opposite", "a")
    for score in (found.accuracy, found.auroc):
        np.testing.assert_array_equal(score.probe[0], [[1, 0, 1], [0, 1, 0]])
        np.testing.assert_allclose(score.selectivity, score.probe - score.control)
    np.testing.assert_array_equal(found.is_own, [[True, False, False], [False, True, False]])
    assert found.summary()["others"]["accuracy"]["probe"].mean == pytest.approx(0.25)


def test_a_set_is_tested_on_what_was_not_trained_on() -> None:
    """One nearest neighbour knows all that it has seen, and nothing else of these labels."""
    values, labels = sets(0.0)
    found = probes.generalise(values, labels, KNeighborsClassifier(1), seeds=range(10))
    assert abs(found.accuracy.probe[:, found.is_own].mean() - 0.5) < 0.1


class Recorder(ClassifierMixin, BaseEstimator):
    """Notes what it is trained on."""

    seen: ClassVar[list[tuple[np.ndarray, np.ndarray]]] = []

    def fit(self, X: np.ndarray, y: np.ndarray) -> Recorder:
        self.seen.append((X[:, 0], y))
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        return X[:, 0]

    def predict(self, X: np.ndarray) -> np.ndarray:
        return (X[:, 0] > 0).astype(int)


def test_the_control_has_the_same_rows_with_shuffled_labels_and_sites_the_same_splits() -> None:
    values, labels = sets(1.0)
    Recorder.seen.clear()
    for _ in range(2):
        probes.generalise(values, labels, Recorder(), train=["a"], seeds=[0, 1])
    (
        (x, y),
        (x_control, y_control),
        (x_next, _),
        *_,
    ) = Recorder.seen
    assert len(x) == 160
    assert y.mean() == 0.5
    np.testing.assert_array_equal(x, x_control)
    assert sorted(y) == sorted(y_control)
    assert 0.3 < (y == y_control).mean() < 0.7
    assert set(x) != set(x_next)
    for once, again in zip(Recorder.seen[:4], Recorder.seen[4:], strict=True):
        np.testing.assert_array_equal(once, again)


PROBES = ("mass-mean", "mass-mean-covariance", "logistic", "lda")


@pytest.mark.parametrize("name", PROBES)
def test_scores_are_those_of_the_probe_fitted_by_hand(name: str) -> None:
    """Accuracy by counting; the area by comparing each true statement with each false one."""
    values, labels = sets(0.3, n=60)
    found = probes.generalise(values, labels, probes.make_probe(name), train=["a"], seeds=[4])
    fitted_on, _ = train_test_split(
        np.arange(60), train_size=0.8, stratify=labels["a"], random_state=4
    )
    probe = probes.make_probe(name).fit(values["a"][fitted_on], labels["a"][fitted_on])
    y, scores = labels["b"], probe.decision_function(values["b"])
    higher = (scores[y == 1][:, None] > scores[y == 0]).mean()
    assert found.auroc.probe[0, 0, 1] == pytest.approx(higher)
    assert found.accuracy.probe[0, 0, 1] == pytest.approx(((scores > 0) == y).mean())
    assert 0.6 < higher < 1


@pytest.mark.parametrize("name", PROBES)
def test_centring_moves_the_threshold_alone(name: str) -> None:
    values, labels = sets(1.0)
    plain = probes.generalise(values, labels, probes.make_probe(name), seeds=[0])
    values["b"] = values["b"] + 30  # Beyond the threshold of the others.
    moved, centred = (
        probes.generalise(values, labels, probes.make_probe(name), seeds=[0], centre=centre)
        for centre in (False, True)
    )
    others = ~moved.is_own
    assert moved.accuracy.probe[:, 0, 1] == pytest.approx(0.5)
    assert (centred.accuracy.probe[:, 0, 1] > 0.9).all()
    for found in (moved, centred):
        np.testing.assert_allclose(found.auroc.probe, plain.auroc.probe, atol=2e-3)
        np.testing.assert_allclose(
            found.accuracy.probe[:, ~others], plain.accuracy.probe[:, ~others]
        )
    assert values["b"].mean() > 29  # The caller's are left alone.


def test_centring_needs_as_many_true_as_false() -> None:
    """As its page says: of a set with three true statements to one the mean is no midpoint."""
    values, labels = sets(0.5)
    kept = np.flatnonzero((labels["b"] == 1) | (np.arange(200) % 6 == 0))
    values["b"], labels["b"] = values["b"][kept], labels["b"][kept]
    probe = probes.make_probe("mass-mean")
    plain, centred = (
        probes.generalise(values, labels, probe, train=["a"], centre=c) for c in (False, True)
    )
    assert plain.accuracy.probe[:, 0, 1].mean() > centred.accuracy.probe[:, 0, 1].mean()


def test_what_cannot_be_scored_is_refused(as_users_run: None) -> None:
    values, labels = sets(1.0)
    probe = probes.make_probe("mass-mean")
    one_sided = {**labels, "b": np.ones(200, dtype=int)}
    with pytest.raises(lch.InputError, match=r"the set b has labels \[1\]"):
        probes.generalise(values, one_sided, probe)
    with pytest.raises(lch.InputError, match="the set b has 200 rows and 3 labels"):
        probes.generalise(values, {**labels, "b": labels["b"][:3]}, probe)
    with pytest.raises(lch.InputError, match="the set b has 200 rows and no labels"):
        probes.generalise(values, {"a": labels["a"]}, probe)
    hard = VotingClassifier([("one", probe)], voting="hard")
    with pytest.raises(lch.InputError, match="has neither decision_function nor predict_proba"):
        probes.generalise(values, labels, hard)


def test_the_interval_is_students() -> None:
    values = np.array([0.5, 0.6, 0.8])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert probes.over_seeds(values) == pytest.approx((values.mean(), low, high))
    assert probes.over_seeds(values[:1]) == (0.5, None, None)


def test_sets_that_are_not_there_are_refused() -> None:
    with pytest.raises(lch.InputError, match="name sets of"):
        probes.generalise(*sets(1.0), probes.make_probe("lda"), train=["c"])
