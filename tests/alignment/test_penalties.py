"""Penalties, held to the whole Jacobian in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.alignment import (
    alignment_loss,
    jacobian,
    jacobian_penalty,
    run,
    squared_jacobian_norm,
)
from lch_plugin.errors import InputError


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    return model.double(), torch.randn(5, 6, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("site", ["", "2", "1:", "1:3"])
def test_with_as_many_projections_as_outputs_the_norm_is_exact(site: str) -> None:
    model, x = network()
    found = run(model, x, site)
    exact = jacobian(found).square().sum((1, 2))
    norm = squared_jacobian_norm(found, n_projections=found.y.shape[1], generator=generator())
    torch.testing.assert_close(norm, exact)


@pytest.mark.parametrize("n_projections", [1, 3])
def test_with_fewer_projections_it_is_unbiased(n_projections: int) -> None:
    model, x = network()
    n_draws = 3000
    # Items are independent: many draws are one batch of the same input.
    found = run(model, x[:1].expand(n_draws, -1).clone())
    norms = squared_jacobian_norm(found, n_projections=n_projections, generator=generator())
    exact = jacobian(run(model, x[:1])).square().sum()
    norms = norms.detach()
    error = norms.std() / n_draws**0.5
    assert float(norms.std()) > 0.05 * float(exact)  # It is an estimate.
    assert abs(float(norms.mean() - exact)) < 4 * float(error)


def test_orthogonal_projections_vary_less_than_independent_ones_would() -> None:
    model, x = network()
    found = run(model, x[:1].expand(2000, -1).clone())
    one, three = (
        squared_jacobian_norm(found, n_projections=n, generator=generator()).var() for n in (1, 3)
    )
    # Of n among d without replacement: (d - n) / (d - 1) of the variance of n independent ones.
    assert float(three) < float(one) / 3 * 0.6


def test_the_gradient_in_the_weights_is_that_of_the_whole_jacobian() -> None:
    model, x = network()
    penalty = jacobian_penalty(run(model, x), weight=0.3, n_projections=4, generator=generator())
    exact = (
        0.3
        * torch.stack(
            [torch.autograd.functional.jacobian(model, row, create_graph=True) for row in x]
        )
        .square()
        .sum((1, 2))
        .mean()
    )
    torch.testing.assert_close(penalty, exact)
    weights = [model[i].weight for i in (0, 2, 4)]
    torch.testing.assert_close(
        torch.autograd.grad(penalty, weights), torch.autograd.grad(exact, weights)
    )


@pytest.mark.parametrize("site", ["", "1:", "2"])
@pytest.mark.parametrize("kind", ["jacobian", "alignment"])
def test_gradients_are_those_of_finite_differences(site: str, kind: str) -> None:
    """At a site within also in the weights before it, which its input depends on."""
    model, x = network()
    bias = model[0].bias

    def penalty(shift: Tensor) -> Tensor:
        """As a function of what is added to the bias of the first layer."""
        with_bias = nn.Sequential(lambda_layer(model[0], bias.detach() + shift), *model[1:])
        found = run(with_bias, x, site)
        if kind == "alignment":
            return alignment_loss(found, weight=2.0)
        return jacobian_penalty(found, n_projections=2, generator=generator())

    shift = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    if site == "2" and kind == "jacobian":  # A linear layer's own Jacobian depends on no bias.
        assert not torch.autograd.grad(penalty(shift), shift, allow_unused=True)[0]
    else:
        assert torch.autograd.gradcheck(penalty, (shift,))


def lambda_layer(linear: nn.Linear, bias: Tensor) -> nn.Module:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, linear.weight.detach(), bias)

    return Shifted()


def test_the_alignment_loss_is_one_less_the_mean_cosine() -> None:
    model, x = network()
    v = torch.randn(4, dtype=torch.float64)
    expert = lch.affine_expert(model, x, v)
    loss = alignment_loss(run(model, x), v, weight=0.5)
    torch.testing.assert_close(loss.detach(), 0.5 * (1 - expert.alignment).mean())


@pytest.mark.parametrize("kind", ["jacobian", "alignment"])
def test_training_on_a_penalty_does_what_it_says(kind: str) -> None:
    model, x = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = []
    for step in range(60):
        found = run(model, x, "1:")
        draws = generator(step)
        penalty = (
            alignment_loss(found)
            if kind == "alignment"
            else jacobian_penalty(found, generator=draws)
        )
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert sum(values[-5:]) < 0.3 * sum(values[:5])


def test_a_generator_makes_it_repeatable_and_leaves_the_global_one_alone() -> None:
    model, x = network()
    state = torch.get_rng_state()
    same = [squared_jacobian_norm(run(model, x), generator=generator(3)) for _ in range(2)]
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=0)
    assert not torch.equal(same[0], squared_jacobian_norm(run(model, x), generator=generator(4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_works() -> None:
    model, x = network()
    found = run(model.bfloat16(), x.bfloat16())
    assert squared_jacobian_norm(found, n_projections=2).dtype == torch.float32


def test_bad_settings_are_refused_in_one_line(as_users_run: None) -> None:
    model, x = network()
    found = run(model, x)
    zero = run(model, torch.zeros_like(x))
    cases: list[tuple[str, Any]] = [
        ("weight=-1", lambda: jacobian_penalty(found, weight=-1.0)),
        ("weight=nan", lambda: alignment_loss(found, weight=float("nan"))),
        ("weight=inf", lambda: alignment_loss(found, weight=float("inf"))),
        ("n_projections=0", lambda: jacobian_penalty(found, n_projections=0)),
        ("n_projections=5", lambda: jacobian_penalty(found, n_projections=5)),
        ("n_projections=True", lambda: jacobian_penalty(found, n_projections=True)),
        ("undefined", lambda: alignment_loss(zero)),
        ("does not broadcast", lambda: alignment_loss(found, torch.ones(3))),
    ]
    for words, call in cases:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    for penalty in (jacobian_penalty, alignment_loss):
        with torch.no_grad(), pytest.raises(InputError, match="gradients are off"):
            penalty(found)
