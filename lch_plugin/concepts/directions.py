"""Directions of a concept: differences of means, classifiers' normals, normals of the boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.concepts.rows import (
    Labels,
    Rows,
    check_regularization,
    checked,
    is_rounding,
    logistic,
)
from lch_plugin.errors import InputError
from lch_plugin.mlp import at_least_float32


@dataclass(frozen=True, eq=False)
class Concept:
    """A direction of a component's input space in which rows with a concept lie.

    Attributes:
        direction: unit vector towards rows with the concept.
        threshold: a row is taken to have the concept if its coordinate along it is larger.
        scale: how far apart the two classes' means are along it. ``scale * direction``, added to
            what a component reads, moves it as far.
        method: how it was found.
    """

    direction: Float[Tensor, " d_in"]
    threshold: float
    scale: float
    method: str

    def scores(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"]:
        """Coordinate along the direction past the threshold: positive with the concept.

        In at least float32.
        """
        if x.shape[-1:] != self.direction.shape:
            raise InputError(
                f"rows of shape {tuple(x.shape)} for a direction of {len(self.direction)} values: "
                "give values of the component that the concept was found at."
            )
        x = x.to(at_least_float32(x))
        return x @ self.direction.to(x) - self.threshold

    def accuracy(self, x: Rows, labels: Labels) -> float:
        """Share of rows on the right side of the threshold.

        Raises:
            InputError: as `difference_of_means`, but one row of a class is enough.
        """
        rows, index = checked(x, labels, per_class=1)
        return float(((self.scores(rows) > 0) == (index == 1)).double().mean())


def difference_of_means(x: Rows, labels: Labels) -> Concept:
    """The mean of rows with a concept less the mean of those without.

    The mass-mean probe of Marks and Tegmark, "The Geometry of Truth" (arXiv 2310.06824), without
    the covariance. The threshold lies half way between the means.

    Args:
        x: centroids or activations of a component, ``(n, d_in)``.
        labels: ``(n,)``, of two classes; the larger one has the concept.

    Returns:
        The concept, in the dtype and on the device of ``x``.

    Raises:
        InputError: rows and labels that do not fit, are of one class, have fewer than two rows
            in a class or are not finite; or means that are the same.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
        >>> concept = lch.concepts.difference_of_means(x, torch.tensor([0, 0, 1, 1]))
        >>> concept.direction, concept.threshold, concept.scale
        (tensor([1., 0.]), 1.0, 2.0)
    """
    rows, index = checked(x, labels)
    means = _means(rows, index)
    direction = _unit(means[1] - means[0], x, "the means of both classes are the same")
    return _concept(x, rows, index, direction, means.mean(0), "difference of means")


def cav(x: Rows, labels: Labels, *, regularization: float = 1.0) -> Concept:
    """Concept activation vector: the unit normal of a linear classifier.

    Kim et al., "Interpretability Beyond Feature Attribution" (arXiv 1711.11279). The classifier is
    scikit-learn's logistic regression on rows that are centred and divided by one number, so that
    the direction does not depend on their units.

    Args:
        x, labels: as `difference_of_means`.
        regularization: penalty of the squared norm, ``1 / C`` of scikit-learn.

    Raises:
        InputError: as `difference_of_means`; or a regularization that is not positive.

    Example:
        >>> concept = lch.concepts.cav(mu, labels)
        >>> with lch.steering.steering(model, "blocks.2.mlp", concept.scale * concept.direction):
        ...     steered = model(tokens)
    """
    check_regularization(regularization)
    rows, index = checked(x, labels)
    if is_rounding(rows - rows.mean(0), x):
        raise InputError("all rows are the same: no classifier tells the classes apart.")
    fitted, mean, scale = logistic(rows, index, regularization)
    normal = torch.from_numpy(fitted.coef_[0]).to(rows)
    direction = _unit(normal, normal[None], "the classifier's normal is zero")
    offset = float(fitted.intercept_[0]) * scale / float(normal.norm())
    return _concept(x, rows, index, direction, mean - offset * direction, "cav")


@dataclass(frozen=True, eq=False)
class Boundary:
    """Normals of the boundary between two classes, where these come near each other.

    Attributes:
        concept: along the mean normal; its threshold is the mean of the midpoints along it.
        pairs: indices of rows without and with the concept, nearest pairs first.
        normals: unit vectors from the one to the other.
        spread: 0 if all normals are the same, 1 if they cancel: one less the norm of their mean.
    """

    concept: Concept
    pairs: Int[Tensor, "n_pairs 2"]
    normals: Float[Tensor, "n_pairs d_in"]
    spread: float


def boundary(x: Rows, labels: Labels, *, n_pairs: int | None = None) -> Boundary:
    """Concept boundary vector: the mean of normals between near pairs of opposite classes.

    The unit vector with the largest mean cosine to the normals is their normalised mean. Distances
    are Euclidean, between all pairs: ``n_0 * n_1`` numbers.

    Args:
        x, labels: as `difference_of_means`.
        n_pairs: the nearest pairs of opposite classes, so many of them; pairs in which each is the
            nearest to the other if None. There always is one.

    Raises:
        InputError: as `difference_of_means`; ``n_pairs`` below 1 or above the number of pairs;
            rows that are the same in both classes; or normals that cancel.

    Example:
        >>> found = lch.concepts.boundary(mu, labels)
        >>> found.concept.direction, found.spread, len(found.pairs)
    """
    rows, index = checked(x, labels)
    without, having = ((index == i).nonzero().flatten() for i in (0, 1))
    distances = torch.cdist(
        rows[without], rows[having], compute_mode="donot_use_mm_for_euclid_dist"
    )
    if n_pairs is not None and not 1 <= n_pairs <= distances.numel():
        raise InputError(f"n_pairs={n_pairs} must be from 1 to {distances.numel()}, all pairs.")
    if n_pairs is None:
        nearest, back = distances.argmin(1), distances.argmin(0)
        own = torch.arange(len(without))
        i = own[back[nearest] == own]
        j = nearest[i]
        order = distances[i, j].argsort(stable=True)
        i, j = i[order], j[order]
    else:
        flat = distances.flatten().argsort(stable=True)[:n_pairs]
        i, j = flat // len(having), flat % len(having)
    pairs = torch.stack([without[i], having[j]], dim=1)
    gaps = rows[pairs[:, 1]] - rows[pairs[:, 0]]
    for pair, gap in zip(pairs.tolist(), gaps, strict=True):
        if not bool(gap.any()):
            raise InputError(f"rows {pair} are the same and of opposite classes: leave one out.")
    normals = gaps / gaps.norm(dim=1, keepdim=True)
    mean = normals.mean(0)
    direction = _unit(mean, normals, "the normals cancel")
    middle = rows[pairs].mean((0, 1))
    return Boundary(
        concept=_concept(x, rows, index, direction, middle, "boundary"),
        pairs=pairs,
        normals=normals.to(x),
        spread=1 - float(mean.norm()),
    )


def _means(rows: Tensor, index: Tensor) -> Float[Tensor, "2 d_in"]:
    return torch.stack([rows[index == i].mean(0) for i in (0, 1)])


def _unit(vector: Tensor, x: Tensor, reason: str) -> Float[Tensor, " d_in"]:
    """A vector of length 1, unless it is zero up to the rounding of what it was computed from."""
    if is_rounding(vector, x):
        raise InputError(f"{reason}: there is no direction. Other examples may have one.")
    return vector / vector.norm()


def _concept(
    x: Tensor, rows: Tensor, index: Tensor, direction: Tensor, middle: Tensor, method: str
) -> Concept:
    """The concept whose threshold is where a point between the classes lies."""
    shown = direction.to(x)
    # Where the direction of x's type puts them: it may be rounded, and rows far from the origin.
    direction = shown.to(rows)
    along = _means(rows, index) @ direction
    return Concept(shown, float(middle @ direction), float(along[1] - along[0]), method)
