"""Directions, held to closed forms and scikit-learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import lch_plugin as lch
from lch_plugin.concepts import boundary, cav, difference_of_means
from tests.concepts.data import D, cosine, gaussians

ESTIMATORS = (difference_of_means, cav, lambda x, y: boundary(x, y).concept)


def test_a_difference_of_means_is_that() -> None:
    x, labels, _, gap = gaussians(40_000)
    found = difference_of_means(x, labels)
    own = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    torch.testing.assert_close(found.scale * found.direction, own)
    torch.testing.assert_close(own, gap, atol=0.1, rtol=0)
    middle = (x[labels == 1].mean(0) + x[labels == 0].mean(0)) / 2
    assert float(found.scores(middle)) == pytest.approx(0, abs=1e-12)


def test_a_cav_is_the_normal_of_linear_discriminant_analysis() -> None:
    """Of Gaussians with one covariance the logistic model is true: its normal is S^-1 (m1 - m0)."""
    x, labels, covariance, gap = gaussians(40_000)
    found = cav(x, labels, regularization=1e-6)
    assert cosine(found.direction, torch.linalg.solve(covariance, gap)) > 0.999
    lda = LinearDiscriminantAnalysis().fit(x.numpy(), labels.numpy())
    assert cosine(found.direction, torch.from_numpy(lda.coef_[0])) > 0.9999
    agree = torch.from_numpy(lda.predict(x.numpy())) == (found.scores(x) > 0)
    assert agree.double().mean() > 0.995
    assert found.accuracy(x, labels) == pytest.approx(
        lda.score(x.numpy(), labels.numpy()), abs=5e-3
    )


def test_a_cav_is_scikit_learns_on_rows_of_one_scale() -> None:
    x, labels, _, _ = gaussians(300)
    mean, scale = x.mean(0), (x - x.mean(0)).square().mean().sqrt()
    theirs = LogisticRegression(C=1 / 3, max_iter=5000)
    theirs.fit(((x - mean) / scale).numpy(), labels.numpy())
    found = cav(x, labels, regularization=3.0)
    assert cosine(found.direction, torch.from_numpy(theirs.coef_[0])) == pytest.approx(1)
    sure = torch.from_numpy(theirs.decision_function(((x - mean) / scale).numpy()))
    ratio = float(torch.from_numpy(theirs.coef_[0]).norm() / scale)
    torch.testing.assert_close(found.scores(x) * ratio, sure, atol=1e-6, rtol=1e-6)
    assert cosine(cav(x, labels, regularization=1e3).direction, found.direction) < 0.999


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_directions_turn_with_the_rows_and_know_no_units(estimator: Any) -> None:
    x, labels, _, _ = gaussians(200)
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    a, b = estimator(x, labels), estimator(1e-4 * (x - 5) @ turn, labels)
    assert cosine(a.direction @ turn, b.direction) == pytest.approx(1, abs=1e-6)
    assert a.accuracy(x, labels) == b.accuracy(1e-4 * (x - 5) @ turn, labels)
    assert b.scale == pytest.approx(1e-4 * a.scale, rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_directions_point_to_the_larger_label(estimator: Any) -> None:
    x, labels, _, _ = gaussians(200)
    a, b = estimator(x, labels), estimator(x, 1 - labels)
    assert cosine(a.direction, b.direction) == pytest.approx(-1, abs=1e-6)
    assert a.accuracy(x, labels) > 0.55
    assert torch.equal(estimator(x, labels == 1).direction, a.direction)
    assert torch.equal(estimator(x, labels * 7).direction, a.direction)
    assert float(a.direction.norm()) == pytest.approx(1)


def halves(n: int = 600, d: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A plane with a known normal; the classes' means are apart along another direction."""
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(n, d, generator=g, dtype=torch.float64) - 1
    labels = (x[:, 0] > 0).long()
    x[:, 1] += 6 * x[:, 0].relu() * labels
    return x, labels, torch.eye(d, dtype=torch.float64)[0]


def test_boundary_normals_are_those_of_the_boundary() -> None:
    """Where the means are apart along another direction, as one class is stretched far away."""
    x, labels, normal = halves()
    found = boundary(x, labels, n_pairs=400)
    assert cosine(found.concept.direction, normal) > 0.95
    assert cosine(difference_of_means(x, labels).direction, normal) < 0.6
    assert abs(found.concept.threshold) < 0.1


def test_mutual_neighbours_are_each_others_nearest() -> None:
    x, labels, _ = halves(80)
    found = boundary(x, labels)
    gaps = torch.cdist(x, x)
    pairs = {tuple(pair) for pair in found.pairs.tolist()}
    a, b = ((labels == i).nonzero().flatten().tolist() for i in (0, 1))
    expected = {
        (i, j)
        for i in a
        for j in b
        if gaps[i, j] == gaps[i, b].min() and gaps[i, j] == gaps[a, j].min()
    }
    assert pairs == expected
    units = torch.stack([(x[j] - x[i]) / (x[j] - x[i]).norm() for i, j in found.pairs])
    torch.testing.assert_close(found.normals, units)
    assert found.spread == pytest.approx(1 - float(units.mean(0).norm()))
    near = gaps[found.pairs[:, 0], found.pairs[:, 1]]
    assert torch.equal(near, near.sort().values)


def test_the_nearest_pairs_are_the_nearest() -> None:
    x, labels, _ = halves(60)
    found = boundary(x, labels, n_pairs=7)
    gaps = torch.cdist(x[labels == 0], x[labels == 1]).flatten().sort().values[:7]
    assert labels[found.pairs].tolist() == [[0, 1]] * 7
    torch.testing.assert_close((x[found.pairs[:, 1]] - x[found.pairs[:, 0]]).norm(dim=1), gaps)


def test_normals_that_are_all_the_same_have_no_spread() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 9.0], [1.0, 0.0], [1.0, 9.0]])
    found = boundary(x, torch.tensor([0, 0, 1, 1]))
    assert found.spread == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found.concept.direction, torch.tensor([1.0, 0.0]))
    assert found.concept.threshold == pytest.approx(0.5)


X = torch.randn(8, D)
Y = torch.arange(8) % 2
BAD = {
    "one class": (X, torch.ones(8, dtype=torch.long), "1 classes"),
    "three classes": (X, torch.arange(8) % 3, "3 classes"),
    "one row of a class": (X, torch.arange(8) == 0, "fewer than 2"),
    "no rows": (X[:0], Y[:0], r"\(0, 6\)"),
    "no columns": (X[:, :0], Y, r"\(8, 0\)"),
    "positions": (X[None], Y, r"\(1, 8, 6\)"),
    "other labels": (X, Y[:7], r"\(7,\)"),
    "labels that are no classes": (X, Y.float(), "float32"),
    "whole numbers": (X.long(), Y, "int64"),
    "not finite": (X / torch.tensor([0.0] + [1.0] * 7)[:, None], Y, "first of them 0"),
    "all the same": (torch.ones(8, D), Y, "same"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.usefixtures("as_users_run")
def test_bad_rows_are_refused_in_one_line(name: str, estimator: Any) -> None:
    x, labels, said = BAD[name]
    with pytest.raises(lch.InputError, match=said) as found:
        estimator(x, labels)
    assert "\n" not in str(found.value)


@pytest.mark.usefixtures("as_users_run")
def test_bad_settings_are_refused() -> None:
    for n_pairs in (0, 17, -1):
        with pytest.raises(lch.InputError, match="n_pairs"):
            boundary(X, Y, n_pairs=n_pairs)
    for regularization in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(lch.InputError, match="regularization"):
            cav(X, Y, regularization=regularization)
    with pytest.raises(lch.InputError, match="cancel"):
        boundary(torch.tensor([[-1.0], [1.0], [-1.1], [1.1]]), torch.tensor([0, 0, 1, 1]) == 1)
    mirrored = torch.tensor([[0.0], [10.0], [1.0], [9.0]])
    with pytest.raises(lch.InputError, match="cancel"):
        boundary(mirrored, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(lch.InputError, match="6 values"):
        difference_of_means(X, Y).scores(X[:, :5])


def test_half_precision_judges_rows_as_well_as_they_are_kept() -> None:
    """Where one coordinate is a thousand times the others, as in residual streams."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    x = torch.randn(400, 64, generator=g)
    x[:, 1:9] += 1.5 * labels[:, None]
    x[:, 0] += 3000
    kept = x.bfloat16()
    for estimator in ESTIMATORS:
        found = estimator(kept, labels)
        exact = estimator(kept.double(), labels).accuracy(kept.double(), labels)
        assert found.accuracy(kept, labels) == pytest.approx(exact, abs=0.01)
        assert found.scores(kept).dtype == torch.float32
        shown = ((found.scores(kept) > 0) == (labels == 1)).double().mean()
        assert float(shown) == pytest.approx(exact, abs=0.01)


def test_results_have_the_type_of_the_rows() -> None:
    for estimator in ESTIMATORS:
        assert estimator(X, Y).direction.dtype == torch.float32
        assert estimator(X.bfloat16(), Y).direction.dtype == torch.bfloat16
