"""What to add to a loss so that a network aligns sooner, at its input or at a site within.

Both are made of the Jacobian, so their gradients are second derivatives: each costs a backward
pass with a graph (one for each projection), and makes that of the loss go through it as well. A
step takes two to three times as long; `benchmarks/alignment.py` measures it.

A ReLU network has them almost everywhere. Attention has to be eager: fused kernels have no second
derivative, and torch says so.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.alignment.measures import centroid_alignment
from lch_plugin.alignment.runs import Run
from lch_plugin.centroids import check_gradients_on
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError


def squared_jacobian_norm(
    found: Run, *, n_projections: int = 1, generator: torch.Generator | None = None
) -> Float[Tensor, " batch"]:
    """``|J|_F^2`` of each item by random projections: unbiased, and differentiable.

    ``E |J^T u|^2 = |J|_F^2`` for ``u`` with identity covariance (Hoffman et al., "Robust Learning
    with Jacobian Regularization", arXiv 1908.02729). Here the ``u`` of an item are orthogonal to
    each other, of length ``sqrt(d_out)``, in directions uniform on the sphere: with as many
    projections as outputs the norm is exact.

    Args:
        found: from `run`.
        n_projections: backward passes, 1 to the number of output coordinates.
        generator: source of the directions; the global one if None.

    Raises:
        InputError: no such number of projections, or gradients are off.
        NotDifferentiableError, NonFiniteError: as `Run.pull`.

    Example:
        >>> linear = torch.nn.Linear(3, 2)
        >>> found = lch.alignment.run(linear, torch.randn(4, 3))
        >>> norm = lch.alignment.squared_jacobian_norm(found, n_projections=2)
        >>> torch.allclose(norm, linear.weight.square().sum().expand(4))
        True
    """
    check_gradients_on()
    y = found.y
    d_out = y[0].numel()
    if isinstance(n_projections, bool) or not 1 <= n_projections <= d_out:
        raise InputError(
            f"n_projections={n_projections} must be 1 or more, and at most the {d_out} coordinates "
            f"that {found.name} writes: with these the norm is exact."
        )
    device = y.device if generator is None else generator.device
    # Decompositions are not offered in half precision.
    dtype = torch.promote_types(y.dtype, torch.float32)
    draws = torch.randn(
        len(y), d_out, n_projections, dtype=dtype, device=device, generator=generator
    )
    directions = torch.linalg.qr(draws).Q * math.sqrt(d_out)
    total = torch.zeros(len(y), dtype=dtype, device=y.device)
    for u in directions.to(y.device).unbind(-1):
        product = found.pull(u.to(y.dtype).view_as(y), create_graph=True)
        total = total + product.flatten(1).to(dtype).square().sum(1)
    return total / n_projections


def jacobian_penalty(
    found: Run,
    *,
    weight: float = 1.0,
    n_projections: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """``weight * mean |J|_F^2``: GrokAlign's penalty, squared so that the estimate is unbiased.

    The published code takes the square root of each item's estimate; that is
    ``squared_jacobian_norm(found).sqrt().mean()``, and the weights of the two differ.

    Args:
        found: from `run`.
        weight: lambda, zero or more. The penalty grows with the square of the outputs.
        n_projections, generator: as `squared_jacobian_norm`.

    Raises:
        InputError: a weight below zero or not finite; or as `squared_jacobian_norm`.
        NotDifferentiableError, NonFiniteError: as `Run.pull`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU())
        >>> found = lch.alignment.run(model, torch.randn(4, 3))
        >>> loss = found.output.square().mean() + lch.alignment.jacobian_penalty(found, weight=1e-3)
        >>> loss.backward()
    """
    _check_weight(weight)
    norms = squared_jacobian_norm(found, n_projections=n_projections, generator=generator)
    return weight * norms.mean()


def alignment_loss(
    found: Run,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    *,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """``weight * mean (1 - cos(mu(x), x))``, 0 to 2 times the weight.

    At a site within, gradients also reach the weights before it, through ``x``.

    Args:
        found: from `run`.
        cotangent: of the centroids; all ones if None.
        weight: zero or more.

    Raises:
        InputError: a weight below zero or not finite, gradients are off, a cotangent that does not
            fit, or an input of zeros.
        NotDifferentiableError, NonFiniteError: as `Run.pull`.
    """
    _check_weight(weight)
    check_gradients_on()
    mu = found.centroid(cotangent, create_graph=True)
    return weight * (1 - centroid_alignment(mu, found.x)).mean()


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(
            f"weight={weight} must be a finite number, zero or more: a negative one would drive "
            "the network away from alignment."
        )
