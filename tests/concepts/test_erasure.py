"""Erasure: nothing linear is left, and as little as possible is gone."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import lch_plugin as lch
from lch_plugin.concepts import Erasure, inlp, leace, refit
from tests.concepts.data import D, gaussians


def three_classes(n: int = 900, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = 2 * torch.eye(D, dtype=torch.float64)[:3]
    return torch.randn(n, D, dtype=torch.float64, generator=g) + centres[labels], labels


def test_leace_makes_the_means_the_same_and_the_mean_stays() -> None:
    for x, labels in (gaussians(500)[:2], three_classes()):
        erasure = leace(x, labels)
        erased = erasure(x)
        means = torch.stack([erased[labels == i].mean(0) for i in labels.unique()])
        torch.testing.assert_close(means, x.mean(0).expand_as(means))
        assert erasure.rank == len(labels.unique()) - 1
        assert int(torch.linalg.matrix_rank(erasure.removed)) == erasure.rank
        torch.testing.assert_close(erasure(erased), erased)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e4])
def test_leace_is_exact_for_faint_concepts_and_in_any_units(unit: float) -> None:
    """Where concept-erasure's own settings leave something."""
    x, labels, _, _ = gaussians(2000, apart=0.05)
    erased = leace(unit * x, labels)(unit * x)
    gap = erased[labels == 1].mean(0) - erased[labels == 0].mean(0)
    assert float(gap.abs().max()) < 1e-9 * unit


def test_leace_is_the_closed_form() -> None:
    """I - W^+ P W, of the whitened cross-covariance: with many rows shrinkage is negligible."""
    x, labels, _, _ = gaussians(50_000)
    covariance = torch.cov(x.T)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors * values.rsqrt() @ vectors.T
    u = whiten @ (x[labels == 1].mean(0) - x[labels == 0].mean(0))
    u = u / u.norm()
    removed = torch.linalg.inv(whiten) @ torch.outer(u, u) @ whiten
    torch.testing.assert_close(leace(x, labels).removed.T, removed, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", [leace, inlp])
def test_a_probe_refitted_on_held_out_rows_is_at_chance(method: Any) -> None:
    x, labels = three_classes(1800)
    found = refit(method(x[:900], labels[:900]), x[900:], labels[900:])
    assert found.before > 0.75
    assert found.chance == pytest.approx(1 / 3)
    assert found.after < 0.38
    assert found.p_value > 0.01
    nothing = Erasure(torch.zeros(D, D).double(), x.mean(0), 0, "none")
    kept = refit(nothing, x[900:], labels[900:])
    assert kept.after == kept.before
    assert kept.p_value < 1e-6


@pytest.mark.parametrize("rows_per_dimension", [1.5, 100])
def test_what_is_left_for_other_rows_depends_on_rows_over_dimensions(
    rows_per_dimension: float,
) -> None:
    """``4 d / n`` is the noise of the difference that is taken out, in units of the covariance."""
    d, n_draws = 20, 8
    n = int(rows_per_dimension * d)
    gap = torch.zeros(d, dtype=torch.float64)
    gap[0] = 2.0  # In 84 % a probe is right.
    left = 0.0
    for seed in range(n_draws):
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 2
        x = torch.randn(n, d, dtype=torch.float64, generator=g) + labels[:, None] * gap
        kept = torch.eye(d).double() - leace(x, labels).removed
        # Of other rows: their difference of means after the erasure, by their covariance.
        inverse = torch.linalg.pinv(kept.T @ kept, rtol=1e-8)
        left += float(gap @ kept @ inverse @ kept.T @ gap) / n_draws
    noise = 4 * d / n
    assert left == pytest.approx(4 * noise / (4 + noise), rel=0.35)


def test_fewer_rows_than_dimensions_are_warned_of() -> None:
    x, labels, _, _ = gaussians(40)
    with pytest.warns(UserWarning, match=r"leace of 6 rows in 6 dimensions.*refit") as found:
        leace(x[:6], labels[:6])
    assert "\n" not in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leace(x, labels)


def test_a_probe_of_the_rows_it_was_fitted_on_is_below_chance() -> None:
    """The means of folds cancel, as those of all are the same: no sign of an erasure."""
    x, labels, _, _ = gaussians(60)
    assert refit(leace(x, labels), x, labels).after < 0.4


def test_inlp_takes_out_the_normals_of_classifiers_one_after_another() -> None:
    x, labels, _, _ = gaussians(400)
    once, thrice = inlp(x, labels, n_rounds=1), inlp(x, labels, n_rounds=3)
    normal = lch.concepts.cav(x, labels).direction
    torch.testing.assert_close(once.removed, torch.outer(normal, normal), atol=1e-6, rtol=0)
    assert (once.rank, thrice.rank) == (1, 3)
    torch.testing.assert_close(thrice.removed, thrice.removed.T)
    torch.testing.assert_close(thrice.removed @ thrice.removed, thrice.removed)
    torch.testing.assert_close(once.removed @ thrice.removed, once.removed, atol=1e-6, rtol=0)
    assert inlp(x, labels, n_rounds=50).rank <= D
    torch.testing.assert_close(thrice(x).mean(0), x.mean(0))


def test_leace_takes_out_less_than_inlp() -> None:
    x, labels, _, _ = gaussians(600)
    change = [(erase(x) - x).square().mean() for erase in (leace(x, labels), inlp(x, labels))]
    assert change[0] < change[1]


def test_refit_is_cross_validated() -> None:
    x, labels, _, _ = gaussians(300)
    erasure = leace(x, labels)
    found = refit(erasure, x, labels, n_folds=3)
    own = LogisticRegression(max_iter=5000).fit(x.numpy(), labels.numpy())
    assert abs(found.before - own.score(x.numpy(), labels.numpy())) < 0.05
    assert found == refit(erasure, x, labels, n_folds=3)
    assert found.n == 300


def test_maps_go_over_positions_and_keep_the_type() -> None:
    x, labels, _, _ = gaussians(100)
    erasure = leace(x.float(), labels)
    values = torch.randn(2, 5, D)
    assert erasure(values).dtype == torch.float32
    torch.testing.assert_close(erasure(values)[1, 3], erasure(values[1, 3]))


@pytest.mark.parametrize("method", [leace, inlp])
def test_rows_in_half_precision_are_erased_in_float32(method: Any) -> None:
    x, labels, _, _ = gaussians(300)
    x = x.bfloat16()
    erasure, exact = method(x, labels), method(x.double(), labels)
    assert erasure(x).dtype == torch.bfloat16
    torch.testing.assert_close(erasure(x.double()), exact(x.double()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(erasure(x), exact(x.double()).bfloat16(), atol=1e-5, rtol=2**-7)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    x, labels, _, _ = gaussians(20)
    erasure = leace(x, labels)
    same = torch.cat([x, x]), torch.arange(40) // 20
    for call, said in [
        (lambda: leace(x, labels * 0), "1 classes"),
        (lambda: inlp(x, labels * 0), "1 classes"),
        (lambda: leace(x[:3], labels[:3]), "fewer than 2"),
        (lambda: leace(x / 0, labels), "not finite"),
        (lambda: inlp(x, labels[1:]), r"\(19,\)"),
        (lambda: leace(*same), "nothing to erase"),
        (lambda: inlp(*same), "nothing to erase"),
        (lambda: inlp(torch.ones(20, D), labels), "nothing to erase"),
        (lambda: inlp(x, labels, n_rounds=0), "n_rounds=0"),
        (lambda: inlp(x, labels, regularization=-1.0), "regularization"),
        (lambda: erasure(x[:, 1:]), "6 dimensions"),
        (lambda: refit(erasure, x[:6], labels[:6]), "fewer than 5"),
        (lambda: refit(erasure, x, labels, n_folds=1), "n_folds=1"),
    ]:
        with pytest.raises(lch.InputError, match=said) as found:
            call()
        assert "\n" not in str(found.value)


def test_without_concept_erasure_leace_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    x, labels, _, _ = gaussians(20)
    with pytest.raises(lch.ToolkitError, match=r"pip install 'lch-plugin\[concepts\]'"):
        leace(x, labels)
    assert inlp(x, labels).rank > 0
