"""Trained on one set of statements, tested on all: the generalisation matrix and its control.

Two measures stand beside each other, since a probe is a direction and a threshold. Accuracy needs
both to be right. The area under the ROC curve needs the direction alone: it is the share of pairs
of a true and a false statement in which the true one scores higher, wherever the threshold lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student
from sklearn.base import clone
from sklearn.metrics import get_scorer
from sklearn.model_selection import train_test_split

from lch_plugin.errors import InputError

#: Share of a set that a probe is trained on; the rest is the set's own test.
TRAIN_SHARE = 0.8
#: Measures of a probe, by name: scikit-learn's scorers.
MEASURES = {"accuracy": get_scorer("accuracy"), "auroc": get_scorer("roc_auc")}
#: What a `Score` has of each measure.
KINDS = ("probe", "control", "selectivity")


class Interval(NamedTuple):
    """A mean over seeds, and its 95 % interval by Student's t; both ends are None of one seed."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Score:
    """One measure of one probe: 0.5 is chance, 1 is best.

    Attributes:
        probe: of each probe on each set.
        control: that of the probe trained on the same statements with shuffled labels.
    """

    probe: Float[np.ndarray, "seed train test"]
    control: Float[np.ndarray, "seed train test"]

    @property
    def selectivity(self) -> Float[np.ndarray, "seed train test"]:
        """The probe's less the control's."""
        return self.probe - self.control

    def over(self, cells: Bool[np.ndarray, "train test"]) -> dict[str, Interval]:
        """Mean over some cells, with its interval over seeds, by name of `KINDS`."""
        return {kind: over_seeds(getattr(self, kind)[:, cells].mean(1)) for kind in KINDS}


@dataclass(frozen=True)
class Generalisation:
    """How one probe does.

    Attributes:
        train: names of the sets trained on, a row each.
        test: names of the sets tested on, a column each; begins with those of ``train``.
        accuracy: share of statements told right.
        auroc: area under the ROC curve. Below 0.5 the direction is reversed.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    accuracy: Score
    auroc: Score

    @property
    def is_own(self) -> Bool[np.ndarray, "train test"]:
        """Where a set is tested on its own held-out part."""
        return np.array([[a == b for b in self.test] for a in self.train])

    def over(self, cells: Bool[np.ndarray, "train test"]) -> dict[str, dict[str, Interval]] | None:
        """Means over some cells by measure and kind; None if there are no cells."""
        if not cells.any():
            return None
        return {measure: getattr(self, measure).over(cells) for measure in MEASURES}

    def summary(self) -> dict[str, dict[str, dict[str, Interval]] | None]:
        """Means over the sets' own tests and over other sets, with intervals over seeds."""
        return {"own": self.over(self.is_own), "others": self.over(~self.is_own)}


def generalise(
    values: Mapping[str, Float[np.ndarray, "_ d"]],
    labels: Mapping[str, Int[np.ndarray, " _"]],
    probe: Any,
    *,
    train: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    centre: bool = False,
) -> Generalisation:
    """Train a probe on each set and test it on all.

    A set is split at random into 80 % to train on and 20 % to test on, with both labels as often in
    each; the other sets are tested on whole. The split, and how the control's labels are shuffled,
    depend on the seed, the labels and the place of the set in ``train`` alone, so that probes on
    other sites meet the same statements.

    Args:
        values: of each set, a row a statement.
        labels: of each set, 0 or 1.
        probe: a classifier with a ``decision_function`` or ``predict_proba``, which is cloned.
        train: sets to train on; all if None.
        seeds: of the splits and of the controls.
        centre: whether each set is first centred at its own mean, as Marks and Tegmark (arXiv
            2310.06824) do. That needs no labels, but the statements that are tested on, held-out
            ones too: the probe is told where a set lies. A set's mean lies between true and false
            only if it has about as many of each. Of a linear probe with a threshold this moves
            nothing else: areas, and accuracies on a set's own test, stay as they are but for
            rounding.

    Raises:
        InputError: no seeds, a set to train on that is not there, labels that are not one of 0 and
            1 for each row with both in each set, or a probe that has no scores to rank by.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(100) % 2
        >>> values = {name: rng.normal(size=(100, 4)) + 5 * y[:, None] for name in ("a", "b")}
        >>> values["b"] += 20  # The same direction, elsewhere.
        >>> labels, probe = dict.fromkeys(values, y), lch.probes.make_probe("mass-mean")
        >>> found = lch.probes.generalise(values, labels, probe)
        >>> found.accuracy.probe.mean(0).tolist(), found.auroc.probe.mean(0).tolist()
        ([[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
        >>> found = lch.probes.generalise(values, labels, probe, centre=True)
        >>> found.accuracy.probe.mean(0).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    train = tuple(values if train is None else train)
    if not seeds or not train or not set(train) <= set(values):
        raise InputError(f"train={train}, seeds={seeds}: name sets of {list(values)}, and a seed.")
    _check(values, labels, probe)
    if centre:
        values = {name: rows - rows.mean(0) for name, rows in values.items()}
    test = (*train, *(name for name in values if name not in train))
    shape = (len(seeds), len(train), len(test))
    scores = {name: Score(np.empty(shape), np.empty(shape)) for name in MEASURES}
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
            for kind, answers in (("probe", y), ("control", shuffled)):
                fitted = clone(probe).fit(values[own][fitted_on], answers)
                for j, other in enumerate(test):
                    rows = held_out if other == own else slice(None)
                    for name, measure in MEASURES.items():
                        into = getattr(scores[name], kind)
                        into[s, i, j] = measure(fitted, values[other][rows], labels[other][rows])
    return Generalisation(train, test, **scores)


def _check(values: Mapping[str, Any], labels: Mapping[str, Any], probe: Any) -> None:
    for name, rows in values.items():
        if name not in labels or len(labels[name]) != len(rows):
            n = len(labels[name]) if name in labels else "no"
            raise InputError(f"the set {name} has {len(rows)} rows and {n} labels: give one each.")
        if set(np.unique(labels[name])) != {0, 1}:
            found = np.unique(labels[name]).tolist()
            raise InputError(f"the set {name} has labels {found}: a probe needs both 0 and 1.")
    if not (hasattr(probe, "decision_function") or hasattr(probe, "predict_proba")):
        raise InputError(
            f"{type(probe).__name__} has neither decision_function nor predict_proba, so that its "
            "area under the ROC curve is not defined: give a classifier with one of them."
        )


def over_seeds(values: Float[np.ndarray, " seed"]) -> Interval:
    """The mean over seeds with its 95 % interval.

    It speaks of other splits of the same statements, and not of other statements or models.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, None, None)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half))
