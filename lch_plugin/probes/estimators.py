"""Linear probes: the mass-mean probe as an estimator, scikit-learn's others, and sparse ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import SelectKBest, f_classif, mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from lch_plugin.errors import InputError
from lch_plugin.names import check_known, did_you_mean


class MassMeanProbe(ClassifierMixin, BaseEstimator):
    """The difference of the two classes' means, as a classifier in scikit-learn's interface.

    ``theta = mean(positive) - mean(negative)``, and a point is positive if it lies on the positive
    side of the midpoint of the means. With ``covariance`` the direction is ``Sigma^-1 theta``,
    Sigma the covariance within the classes (pseudo-inverted): the linear discriminant without its
    prior odds. Marks and Tegmark, "The Geometry of Truth" (arXiv 2310.06824), have
    both; theirs has no intercept, since they centre each data set at its own mean.

    Args:
        covariance: whether to correct for the covariance within the classes.

    Attributes:
        classes_: the two labels; the second is the positive one.
        theta_: the difference of means, ``(n_features,)``.
        coef_: the direction that is read, ``(1, n_features)``.
        intercept_: ``(1,)``, which makes the midpoint of the means score zero.

    Example:
        >>> X = np.array([[0.0, 1.0], [0.0, 3.0], [4.0, 1.0], [4.0, 3.0]])
        >>> probe = lch.probes.MassMeanProbe().fit(X, [0, 0, 1, 1])
        >>> probe.theta_.tolist(), probe.predict([[3.0, 0.0]]).tolist()
        ([4.0, 0.0], [1])
    """

    def __init__(self, covariance: bool = False) -> None:
        self.covariance = covariance

    def fit(self, X: Any, y: Any) -> MassMeanProbe:
        """Find the direction.

        Raises:
            ValueError: as scikit-learn's estimators; the labels are not two.
        """
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        self.classes_, sides = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            n = len(self.classes_)
            # The words that scikit-learn's own checks look for.
            raise ValueError(
                "Only binary classification is supported: a mass-mean probe needs two classes, "
                f"and y has {n} {'class' if n == 1 else 'classes'}."
            )
        X = X.astype(np.float64)
        means = np.stack([X[sides == side].mean(0) for side in (0, 1)])
        self.theta_ = means[1] - means[0]
        direction = self.theta_
        if self.covariance:
            within = X - means[sides]
            sigma = within.T @ within / len(X)
            # What is zero but for rounding must not be inverted.
            cut = max(X.shape) * np.finfo(np.float64).eps
            direction = np.linalg.pinv(sigma, rcond=cut, hermitian=True) @ self.theta_
        self.coef_ = direction[None]
        self.intercept_ = -(means.mean(0) @ self.coef_.T)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """How far each point lies beyond the midpoint, along the direction; positive is class 1."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        scores: np.ndarray = X @ self.coef_[0] + self.intercept_[0]
        return scores

    def predict(self, X: Any) -> np.ndarray:
        """The class of each point."""
        scores = self.decision_function(X)
        labels: np.ndarray = self.classes_[(scores > 0).astype(int)]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


#: The probes that have a name, by it. Each coordinate is scaled where the scale changes the probe.
PROBES: dict[str, Any] = {
    "mass-mean": MassMeanProbe(),
    "mass-mean-covariance": MassMeanProbe(covariance=True),
    "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    "lda": make_pipeline(
        StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    ),
}


def make_probe(name: str) -> Any:
    """A new probe of a name in `PROBES`, not fitted.

    Raises:
        InputError: no such name.
    """
    if name not in PROBES:
        raise InputError(f"probe {name!r} is not known. {did_you_mean(name, PROBES)}")
    return clone(PROBES[name])


def mean_difference(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the means of two classes are apart in each coordinate, a score of `SelectKBest`."""
    labels = np.unique(y)
    difference: np.ndarray = np.abs(X[y == labels[-1]].mean(0) - X[y == labels[0]].mean(0))
    return difference


#: What coordinates of a sparse probe can be ranked by: scores of `SelectKBest`.
RANKINGS: dict[str, Any] = {
    "mean-difference": mean_difference,
    "f": f_classif,
    "mutual-information": partial(mutual_info_classif, random_state=0),
}


def sparse_probe(probe: Any, k: int, rank_by: str = "mean-difference") -> Any:
    """A probe on the ``k`` coordinates that rank first, fitted on these alone.

    Gurnee et al., "Finding Neurons in a Haystack" (arXiv 2305.01610), rank neurons in several ways.
    These are those that look at one coordinate at a time.

    Args:
        probe: an estimator.
        k: how many coordinates.
        rank_by: a name in `RANKINGS`: the difference of the classes' means, in the units of the
            coordinate; scikit-learn's F statistic, which is free of units; or its estimate of the
            mutual information with the label, which takes milliseconds a coordinate.

    Raises:
        InputError: no such ranking.

    Example:
        >>> X = np.array([[0.0, 1.0], [0.0, 3.0], [4.0, 1.0], [4.0, 3.0]])
        >>> probe = lch.probes.sparse_probe(lch.probes.make_probe("logistic"), 1, rank_by="f")
        >>> probe.fit(X + np.eye(4, 2), [0, 0, 1, 1])[0].get_support().tolist()
        [True, False]
    """
    check_known("rank_by", rank_by, RANKINGS)
    return make_pipeline(SelectKBest(RANKINGS[rank_by], k=k), probe)
