"""Trained on one set of statements, tested on all: the generalisation matrix and its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import t as student
from sklearn.base import clone
from sklearn.model_selection import train_test_split

from lch_plugin.errors import InputError

#: Share of a set that a probe is trained on; the rest is the set's own test.
TRAIN_SHARE = 0.8


class Interval(NamedTuple):
    """A mean over seeds, and its 95 % interval by Student's t; both ends are None of one seed."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Generalisation:
    """Accuracies of one probe.

    Attributes:
        train: names of the sets trained on, a row each.
        test: names of the sets tested on, a column each; begins with those of ``train``.
        accuracy: share of statements told right.
        control: that of the probe trained on the same statements with shuffled labels.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    accuracy: Float[np.ndarray, "seed train test"]
    control: Float[np.ndarray, "seed train test"]

    @property
    def selectivity(self) -> Float[np.ndarray, "seed train test"]:
        """Accuracy less that of the control."""
        return self.accuracy - self.control

    @property
    def is_own(self) -> np.ndarray:
        """Where a set is tested on its own held-out part, ``(train, test)``."""
        return np.array([[a == b for b in self.test] for a in self.train])

    def summary(self) -> dict[str, dict[str, Interval] | None]:
        """Means over the sets' own tests and over other sets, with intervals over seeds."""
        cells = {"own": self.is_own, "others": ~self.is_own}
        return {
            where: {
                name: over_seeds(values[:, chosen].mean(1))
                for name, values in (
                    ("accuracy", self.accuracy),
                    ("control", self.control),
                    ("selectivity", self.selectivity),
                )
            }
            if chosen.any()
            else None
            for where, chosen in cells.items()
        }


def generalise(
    values: Mapping[str, Float[np.ndarray, "_ d"]],
    labels: Mapping[str, Int[np.ndarray, " _"]],
    probe: Any,
    *,
    train: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Generalisation:
    """Train a probe on each set and test it on all.

    A set is split at random into 80 % to train on and 20 % to test on, with both labels as often in
    each; the other sets are tested on whole. The split, and how the control's labels are shuffled,
    depend on the seed and the labels alone, so that probes on other sites meet the same statements.

    Args:
        values: of each set, a row a statement.
        labels: of each set, 0 or 1.
        probe: an estimator, which is cloned.
        train: sets to train on; all if None.
        seeds: of the splits and of the controls.

    Raises:
        InputError: no seeds, or a set to train on that is not there.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(100) % 2
        >>> values = {name: rng.normal(size=(100, 4)) + 5 * y[:, None] for name in ("a", "b")}
        >>> labels = dict.fromkeys(values, y)
        >>> found = lch.probes.generalise(values, labels, lch.probes.make_probe("mass-mean"))
        >>> found.accuracy.shape, float(found.accuracy.min())
        ((3, 2, 2), 1.0)
    """
    train = tuple(values if train is None else train)
    if not seeds or not train or not set(train) <= set(values):
        raise InputError(f"train={train}, seeds={seeds}: name sets of {list(values)}, and a seed.")
    test = (*train, *(name for name in values if name not in train))
    shape = (len(seeds), len(train), len(test))
    accuracy, control = np.empty(shape), np.empty(shape)
    for s, seed in enumerate(seeds):
        for i, own in enumerate(train):
            fitted_on, held_out = train_test_split(
                np.arange(len(labels[own])),
                train_size=TRAIN_SHARE,
                stratify=labels[own],
                random_state=seed,
            )
            y = labels[own][fitted_on]
            shuffled = np.random.default_rng([seed, i]).permutation(y)
            for found, answers in ((accuracy, y), (control, shuffled)):
                fitted = clone(probe).fit(values[own][fitted_on], answers)
                for j, other in enumerate(test):
                    rows = held_out if other == own else slice(None)
                    found[s, i, j] = fitted.score(values[other][rows], labels[other][rows])
    return Generalisation(train, test, accuracy, control)


def over_seeds(values: Float[np.ndarray, " seed"]) -> Interval:
    """The mean over seeds with its 95 % interval.

    It speaks of other splits of the same statements, and not of other statements or models.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, None, None)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half))
