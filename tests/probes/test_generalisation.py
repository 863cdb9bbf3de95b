"""What is trained on is not tested on, and the control knows no labels."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
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
    np.testing.assert_array_equal(found.accuracy[0], [[1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(found.is_own, [[True, False, False], [False, True, False]])
    assert found.summary()["others"]["accuracy"].mean == pytest.approx(0.25)
    np.testing.assert_allclose(found.selectivity, found.accuracy - found.control)


def test_a_set_is_tested_on_what_was_not_trained_on() -> None:
    """One nearest neighbour knows all that it has seen, and nothing else of these labels."""
    values, labels = sets(0.0)
    found = probes.generalise(values, labels, KNeighborsClassifier(1), seeds=range(10))
    assert abs(found.accuracy[:, found.is_own].mean() - 0.5) < 0.1


class Recorder(ClassifierMixin, BaseEstimator):
    """Notes what it is trained on."""

    seen: ClassVar[list[tuple[np.ndarray, np.ndarray]]] = []

    def fit(self, X: np.ndarray, y: np.ndarray) -> Recorder:
        self.seen.append((X[:, 0], y))
        return self

    def score(self, X: np.ndarray, y: np.ndarray) -> float:
        return 0.5


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


def test_the_interval_is_students() -> None:
    values = np.array([0.5, 0.6, 0.8])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert probes.over_seeds(values) == pytest.approx((values.mean(), low, high))
    assert probes.over_seeds(values[:1]) == (0.5, None, None)


def test_sets_that_are_not_there_are_refused() -> None:
    with pytest.raises(lch.InputError, match="name sets of"):
        probes.generalise(*sets(1.0), probes.make_probe("lda"), train=["c"])
