"""What is measured of the features of an SAE, on labelled items that training has not seen.

Feature activations are matrices ``(n_items, d_sae)``: of each item the mean over its rows. Raw
values of a component, averaged in the same way, take their place in the baselines.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from torch import Tensor

from lch_plugin.statistics import varies

#: How many features a sparse probe may use.
SPARSE = (1, 5, 10)


def probe_accuracy(
    train: Float[np.ndarray, "n_train d"],
    train_labels: np.ndarray,
    test: Float[np.ndarray, "n_test d"],
    test_labels: np.ndarray,
    *,
    of_feature_acts: bool = True,
) -> float:
    """Share of test items whose label logistic regression on all features gets right.

    Args:
        train, test: activations of features, or raw values.
        train_labels, test_labels: of the items.
        of_feature_acts: these are scaled by their largest absolute value, raw values
            standardised.
    """
    probe = make_pipeline(_scaler(of_feature_acts), LogisticRegression(max_iter=2000))
    return float(probe.fit(train, train_labels).score(test, test_labels))


def sparse_probe_accuracies(
    train: Float[np.ndarray, "n_train d"],
    train_labels: np.ndarray,
    test: Float[np.ndarray, "n_test d"],
    test_labels: np.ndarray,
    *,
    of_feature_acts: bool = True,
    n_features: Sequence[int] = SPARSE,
) -> dict[int, float]:
    """How well a few features tell one label from all others, averaged over labels.

    For each label the features that differ most between its training items and the others, by the
    F statistic of an analysis of variance, are probed with logistic regression in which both sides
    weigh the same. The score of a label is the balanced accuracy: 0.5 is chance. After Gurnee et
    al., "Finding Neurons in a Haystack" (2023), which compares such criteria.

    Args:
        train, test: activations of features, or raw values.
        train_labels, test_labels: of the items.
        of_codes: as `probe_accuracy`.
        n_features: how many to choose for each label.

    Returns:
        The mean score by number of features.
    """
    scores: dict[int, list[float]] = {n: [] for n in n_features}
    for label in np.intersect1d(train_labels, test_labels):
        is_train, is_test = train_labels == label, test_labels == label
        ranking = _most_different(train, is_train)
        for n, found in scores.items():
            chosen = ranking[:n]
            probe = make_pipeline(
                _scaler(of_feature_acts), LogisticRegression(class_weight="balanced", max_iter=2000)
            )
            probe.fit(train[:, chosen], is_train)
            found.append(balanced_accuracy_score(is_test, probe.predict(test[:, chosen])))
    return {n: float(np.mean(found)) for n, found in scores.items()}


def _most_different(
    values: Float[np.ndarray, "n d"], is_label: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, " d"]:
    """Features by the F statistic of two groups, the most different first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of features that are constant, in a group or in both.
        statistic, _ = f_classif(values, is_label)
    return np.argsort(-np.nan_to_num(statistic, nan=-1.0), kind="stable")


def majority_accuracy(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Share of test items with the label that most training items have."""
    labels, counts = np.unique(train_labels, return_counts=True)
    return float(np.mean(test_labels == labels[counts.argmax()]))


def label_agreement(
    feature_acts: Float[np.ndarray, "n_items d_sae"], labels: np.ndarray, n_neighbours: int
) -> float:
    """Share of an item's nearest neighbours that have its label, averaged over items.

    Near are items with the same features active: by the Jaccard index, features active in both over
    features active in either. Of neighbours that are tied for the last places each counts in part,
    so that the order of the items does not matter.

    Args:
        feature_acts: zero where a feature is not active.
        labels: of the items.
        n_neighbours: less than the number of items.
    """
    active = torch.from_numpy(feature_acts != 0)
    _, numbers = np.unique(labels, return_inverse=True)
    of_item = torch.from_numpy(numbers)
    shares = [
        _nearest_with_label(active, of_item, chunk, n_neighbours)
        for chunk in torch.arange(len(feature_acts)).split(1024)
    ]
    return float(torch.cat(shares).mean())


def _nearest_with_label(
    active: Bool[Tensor, "n_items d_sae"],
    labels: Int[Tensor, " n_items"],
    chunk: Int[Tensor, " n_chunk"],
    n_neighbours: int,
) -> Float[Tensor, " n_chunk"]:
    indicator = active.float()
    both = indicator[chunk] @ indicator.T
    sizes = indicator.sum(1)
    similarity = both / (sizes[chunk, None] + sizes - both).clamp_min(1)
    similarity[torch.arange(len(chunk)), chunk] = -1  # No item is its own neighbour.
    last = similarity.topk(n_neighbours, dim=1).values[:, -1:]
    nearer, tied = similarity > last, similarity == last
    # In double precision, so that shares which are the same for two SAEs are so to its rounding.
    places = (n_neighbours - nearer.sum(1, keepdim=True)).double()
    weight = nearer + tied * places / tied.sum(1, keepdim=True)
    return (weight * (labels[chunk, None] == labels)).sum(1) / n_neighbours


def chance_agreement(labels: np.ndarray) -> float:
    """Share of pairs of items that have the same label: what `label_agreement` is by chance."""
    counts = np.unique(labels, return_counts=True)[1]
    n = len(labels)
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


def mean_max_cosine(W: Float[Tensor, "n d_in"], other: Float[Tensor, "m d_in"]) -> float:
    """Mean over features of the largest cosine with a feature of the other dictionary.

    In both directions, averaged.

    Args:
        W, other: decoder rows of the features that count.
    """
    unit, other_unit = (torch.nn.functional.normalize(w.float(), dim=-1) for w in (W, other))
    return _mean_max(unit @ other_unit.T)


def mean_max_correlation(
    feature_acts: Float[np.ndarray, "n_items d"], other: Float[np.ndarray, "n_items m"]
) -> float:
    """Mean over features of the largest Pearson correlation with a feature of another dictionary.

    In both directions, averaged, over the same items, and over the features that vary by more than
    rounding. The other dictionary may be that of another model, whose space has nothing to do with
    this one's.
    """
    return _mean_max(_standardise(feature_acts).T @ _standardise(other) / len(feature_acts))


def _standardise(feature_acts: Float[np.ndarray, "n d"]) -> Float[Tensor, "n varying"]:
    varying = torch.from_numpy(feature_acts[:, varies(feature_acts)]).double()
    centred = varying - varying.mean(0)
    return centred / centred.square().mean(0).sqrt()


def _mean_max(similarity: Float[Tensor, "n m"]) -> float:
    if not similarity.numel():
        return 0.0  # A dictionary of which nothing fires is like no other.
    return float(similarity.amax(1).mean() + similarity.amax(0).mean()) / 2


def probe_scores(
    train: Float[np.ndarray, "n_train d"],
    train_labels: np.ndarray,
    test: Float[np.ndarray, "n_test d"],
    test_labels: np.ndarray,
    *,
    of_feature_acts: bool = True,
) -> dict[str, float]:
    """All probes of one kind of label: ``probe``, and ``sparse_probe_N`` for N features."""
    data = (train, train_labels, test, test_labels)
    sparse = sparse_probe_accuracies(*data, of_feature_acts=of_feature_acts)
    return {
        "probe": probe_accuracy(*data, of_feature_acts=of_feature_acts),
        **{f"sparse_probe_{n}": score for n, score in sparse.items()},
    }


def _scaler(of_feature_acts: bool) -> Any:
    # Features are sparse, and a feature that is off stays at zero; raw values are neither.
    return MaxAbsScaler() if of_feature_acts else StandardScaler()
