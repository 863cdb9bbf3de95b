"""How aligned a network is, as four numbers.

- *Alignment*: the cosine of centroid and input, ``cos(mu(x), x)``.
- *Norm* of the centroids.
- *First component*: the share of the centroids' variance along their first principal component.
- *Effective rank* of the Jacobian: the exponential of the entropy of its normalised singular
  values (Roy & Vetterli 2007). It is 1 of a matrix of rank one.

A network whose Jacobian has rank one, and points along the input, has the smallest Jacobian that
its outputs allow (Walker et al., "GrokAlign", arXiv 2506.12284).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.alignment.runs import Inputs, Model, Run, run
from lch_plugin.centroids import cosine
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError, NonFiniteError
from lch_plugin.mlp import at_least_float32
from lch_plugin.statistics import is_rounding

# A Jacobian takes a backward pass a row.
MAX_OUTPUTS = 1024


@dataclass(frozen=True)
class Measurement:
    """The measures of one batch.

    Attributes:
        alignment: mean over items of ``cos(mu(x), x)``, -1 to 1.
        centroid_norm: mean over items of ``|mu(x)|``, in units of output over input.
        first_component: share of the centroids' variance along their first principal component,
            0 to 1; None where all centroids are equal.
        effective_rank: mean over items, 1 to ``min(d_out, d_in)``; 0 where the Jacobian is zero;
            None if it was not asked for.
    """

    alignment: float
    centroid_norm: float
    first_component: float | None
    effective_rank: float | None


def measure(
    model: Model,
    inputs: Inputs,
    site: str = "",
    *,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    output: Callable[[Any], Tensor] | None = None,
    rank: bool = True,
) -> Measurement:
    """All measures of one batch, from one forward pass, in the model's mode.

    Costs one backward pass, and with ``rank`` another for each coordinate of the output.

    Args:
        model, inputs, site, output: as `run`.
        cotangent: of the centroids; all ones if None.
        rank: whether to take the effective rank, which needs the whole Jacobian.

    Raises:
        InputError: as `run`, `centroid_alignment` and `jacobian`; or a batch of one item.
        SiteError: as `run`.
        NotDifferentiableError, NonFiniteError: as `Run.pull`.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> found = lch.alignment.measure(model, torch.randn(8, 3))
        >>> round(found.effective_rank, 4), found.first_component is None
        (1.0, True)
    """
    found = run(model, inputs, site, output=output)
    _check_rows(len(found.x))
    if rank:
        _check_outputs(found)
    mu = found.centroid(cotangent)
    return Measurement(
        alignment=float(centroid_alignment(mu, found.x.detach()).mean()),
        centroid_norm=float(mu.to(at_least_float32(mu)).flatten(1).norm(dim=1).mean()),
        first_component=None if _are_equal(mu) else first_component_share(mu),
        effective_rank=float(effective_rank(jacobian(found)).mean()) if rank else None,
    )


def centroid_alignment(
    mu: Float[Tensor, "batch ..."], x: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """``cos(mu(x), x)`` of each item, in at least float32; differentiable in both.

    A centroid of zero, where the component is constant, counts as 0.

    Args:
        mu: centroids, in the shape of ``x``.
        x: inputs.

    Raises:
        InputError: shapes that differ, or an input of zeros, which has no direction.
        NonFiniteError: centroids or inputs with NaN or infinite values.
    """
    if mu.shape != x.shape or mu.ndim < 1:
        raise InputError(
            f"mu has shape {tuple(mu.shape)} and x {tuple(x.shape)}: a centroid has the shape of "
            "its input, with items first."
        )
    _check_finite("centroids", mu)
    _check_finite("inputs", x)
    mu, x = (t.reshape(len(t), -1) for t in (mu, x))
    zeros = (~x.any(1)).nonzero().flatten().tolist()
    if zeros:
        raise InputError(
            f"items {zeros[:3]} (of {len(zeros)} such) are all zeros, and the cosine with a "
            "vector of zeros is undefined. Leave them out, or shift the inputs."
        )
    return cosine(mu, x)


def first_component_share(mu: Float[Tensor, "batch ..."]) -> float:
    """Share of the variance of centroids that lies along their first principal component.

    Args:
        mu: centroids, items first. Their mean is taken out.

    Returns:
        1 of points on a line; about ``1/d`` of an even cloud.

    Raises:
        InputError: fewer than two items, or all of them equal but for rounding.
        NonFiniteError: values that are NaN or infinite.
    """
    _check_rows(len(mu))
    _check_finite("centroids", mu)
    if _are_equal(mu):
        raise InputError(
            f"all {len(mu)} centroids are equal, and have no principal component: the component "
            "is affine, or the items are all the same."
        )
    rows = mu.detach().reshape(len(mu), -1).double()
    rows = rows - rows[:1]
    rows = rows / rows.abs().max()
    variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return float(variances[0] / variances.sum())


def jacobian(found: Run) -> Float[Tensor, "batch d_out d_in"]:
    """The whole Jacobian of each item, by a backward pass for each coordinate of the output.

    Args:
        found: from `run`.

    Raises:
        InputError: more than 1,024 coordinates.
        NotDifferentiableError, NonFiniteError: as `Run.pull`.
    """
    d_out = _check_outputs(found)
    rows = []
    for i in range(d_out):
        v = torch.zeros_like(found.y).flatten(1)
        v[:, i] = 1
        rows.append(found.pull(v.view_as(found.y)).flatten(1))
    return torch.stack(rows, dim=1)


def effective_rank(J: Float[Tensor, "*batch d_out d_in"]) -> Float[Tensor, "*batch"]:
    """``exp`` of the entropy of ``p = singular values / their sum``, of each matrix.

    Args:
        J: matrices.

    Returns:
        1 of rank one, ``n`` of ``n`` equal singular values, 0 of zeros. In float64.

    Raises:
        NonFiniteError: values that are NaN or infinite.
    """
    _check_finite("Jacobians", J)
    sizes = torch.linalg.svdvals(J.detach().double())
    total = sizes.sum(-1, keepdim=True)
    p = sizes / torch.where(total == 0, 1, total)
    return torch.where(total[..., 0] == 0, 0, torch.special.entr(p).sum(-1).exp())


def _are_equal(mu: Tensor) -> bool:
    """Whether rows differ by rounding alone, as those of an affine component do.

    Of the largest coordinate: all of them are sums over the same weights.
    """
    return is_rounding(mu - mu[:1], float(mu.abs().max()), mu.dtype)


def _check_rows(n_rows: int) -> None:
    if n_rows < 2:
        raise InputError(f"a batch of {n_rows} has no principal component: pass two items or more.")


def _check_outputs(found: Run) -> int:
    d_out = found.y[0].numel()
    if d_out > MAX_OUTPUTS:
        raise InputError(
            f"{found.name} has {d_out} coordinates of output, and a Jacobian takes a backward pass "
            f"for each: at most {MAX_OUTPUTS}. Choose some with output=, or pass rank=False."
        )
    return d_out


def _check_finite(what: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(f"{what} with NaN or infinite values: look for what overflowed.")
