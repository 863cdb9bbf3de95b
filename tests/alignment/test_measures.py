"""Measures, held to closed forms and to scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from lch_plugin.alignment import (
    centroid_alignment,
    effective_rank,
    first_component_share,
    jacobian,
    measure,
    run,
)
from lch_plugin.errors import InputError, NonFiniteError


def test_alignment_is_one_along_the_input_and_minus_one_against_it() -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(centroid_alignment(2 * x, x), torch.ones(4).double())
    torch.testing.assert_close(centroid_alignment(-x, x), -torch.ones(4).double())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_alignment_does_not_depend_on_sizes(size: float) -> None:
    torch.manual_seed(0)
    mu, x = torch.randn(4, 6), torch.randn(4, 6)
    cosines = (mu * x).sum(1) / mu.norm(dim=1) / x.norm(dim=1)
    torch.testing.assert_close(centroid_alignment(mu * size, x), cosines)
    torch.testing.assert_close(centroid_alignment(mu, x * size), cosines)


def test_a_component_that_is_constant_counts_as_zero_and_has_no_gradient() -> None:
    mu = torch.zeros(2, 3, requires_grad=True)
    aligned = centroid_alignment(mu, torch.ones(2, 3))
    assert (aligned == 0).all()
    (gradient,) = torch.autograd.grad(aligned.sum(), mu)
    assert (gradient == 0).all()


def test_the_gradient_of_alignment_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    mu, x = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(centroid_alignment, (mu, x))


def test_the_first_component_is_scikit_learns() -> None:
    torch.manual_seed(0)
    mu = torch.randn(20, 5, dtype=torch.float64) * torch.tensor([5.0, 1, 1, 1, 0.1]) + 100
    share = PCA().fit(mu.numpy()).explained_variance_ratio_[0]
    assert first_component_share(mu) == pytest.approx(share, rel=1e-9)
    assert first_component_share(mu.view(20, 5, 1) * 1e-200) == pytest.approx(share, rel=1e-9)


def test_points_on_a_line_have_one_component() -> None:
    assert first_component_share(torch.arange(6.0)[:, None] * torch.ones(1, 3)) == pytest.approx(1)


def test_the_effective_rank_of_known_singular_values() -> None:
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.25))
    cases = [([3, 3, 3, 3], 4), ([7, 0, 0, 0], 1), ([2, 1, 1, 0], math.exp(entropy)), ([0] * 4, 0)]
    for sizes, rank in cases:
        J = Q @ torch.diag(torch.tensor(sizes).double()) @ Q.T.roll(1, 0)
        assert float(effective_rank(J)) == pytest.approx(rank)


def test_a_measurement_is_made_of_the_measures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    found, part = measure(model, x, "1:"), run(model, x, "1:")
    mu, h = part.centroid(), part.x.detach()
    assert found.alignment == pytest.approx(float(centroid_alignment(mu, h).mean()))
    assert found.centroid_norm == pytest.approx(float(mu.norm(dim=1).mean()))
    assert found.first_component == pytest.approx(first_component_share(mu))
    assert found.effective_rank == pytest.approx(float(effective_rank(jacobian(part)).mean()))
    v = torch.eye(4, dtype=torch.float64)[1]
    assert measure(model, x, cotangent=v).alignment != measure(model, x).alignment
    assert measure(model, x, rank=False).effective_rank is None


def test_a_network_of_rank_one_along_the_data_is_measured_as_such() -> None:
    """``f(x) = c |x|^2 / 2`` has the Jacobian ``c x^T``: normal alignment."""
    c = torch.tensor([1.0, 2.0, 0.5])
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    found = measure(lambda x: x.square().sum(1, keepdim=True) * c / 2, x)
    assert found.alignment == pytest.approx(1, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-5)
    assert found.centroid_norm == pytest.approx(3.5 * float(x.norm(dim=1).mean()), rel=1e-5)


def test_an_affine_network_has_equal_centroids_and_so_no_first_component() -> None:
    assert measure(nn.Linear(3, 2), torch.randn(4, 3)).first_component is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_centroids_are_equal_if_they_differ_by_the_rounding_of_their_type(
    dtype: torch.dtype,
) -> None:
    """A tenth is no rounding in half precision either."""
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to(dtype)
    x = torch.randn(33, 64).to(dtype)
    assert measure(deep, x, rank=False).first_component is None
    curved = nn.Sequential(nn.Linear(4, 4), nn.Softplus()).to(dtype)
    with torch.no_grad():
        for parameter in curved.parameters():
            parameter.fill_(0.05)
    mu = run(curved, (x[:, :4] / 2)).centroid()
    spread = float((mu - mu[:1]).abs().max() / mu.abs().max())
    assert 0.05 < spread < 0.2
    assert measure(curved, x[:, :4] / 2, rank=False).first_component == pytest.approx(1, abs=0.01)


def test_bad_values_are_refused_in_one_line() -> None:
    x, model = torch.randn(4, 3), nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    zero = x.clone()
    zero[2] = 0
    wide = nn.Linear(3, 2000)
    cases: list[tuple[type[Exception], str, Any]] = [
        (InputError, "batch of 1 has no principal component", lambda: measure(model, x[:1])),
        (InputError, "batch of 1", lambda: first_component_share(x[:1])),
        (InputError, "are equal", lambda: first_component_share(torch.ones(3, 2))),
        (InputError, r"items \[2\].*undefined", lambda: measure(model, zero)),
        (InputError, "shape of its input", lambda: centroid_alignment(x, x[:, :2])),
        (InputError, "rank=False", lambda: measure(wide, x)),
        (NonFiniteError, "NaN", lambda: centroid_alignment(x * torch.nan, x)),
        (NonFiniteError, "NaN", lambda: centroid_alignment(x, x * torch.inf)),
        (NonFiniteError, "NaN", lambda: first_component_share(x * torch.nan)),
        (NonFiniteError, "NaN", lambda: effective_rank(x * torch.nan)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert measure(wide, x, rank=False).centroid_norm > 0
