"""What is shown of a component: its centroid, and the numbers that go with it.

By the endings of their names (`lch_plugin.sites.Settings.endings`), each computed when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.centroids import centroid, cosine, mean_over_neighbourhood, offset_and_radius
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Settings

Values: TypeAlias = Mapping[str, Callable[[], Tensor]]


def expert_values(
    mu: Float[Tensor, ...],
    x: Float[Tensor, ...],
    y: Float[Tensor, ...],
    v: Float[Tensor, ...],
    *,
    mixes_positions: bool,
) -> Values:
    """Centroid, offset, radius and alignment, in at least float32.

    A component that mixes positions has one affine expert a sequence: ``(batch,)``. Another one has
    one a position, with a last dimension of one, for positions to be where they are in a centroid.

    Args:
        mu: centroid, in the shape of ``x``.
        x: what the component reads.
        y: what it writes.
        v: cotangent, in the shape of ``y``.
        mixes_positions: whether outputs at one position depend on inputs at others.
    """
    mu = mu.to(at_least_float32(mu))

    @cache
    def numbers() -> tuple[Tensor, ...]:
        if mixes_positions:
            return offset_and_radius(*(t.flatten(1) for t in (mu, x, y, v)))
        return tuple(value[..., None] for value in offset_and_radius(mu, x, y, v))

    return {
        "": lambda: mu,
        "_offset": lambda: numbers()[0],
        "_radius": lambda: numbers()[1],
        "_alignment": lambda: cosine(mu, x)[..., None],
    }


def local_values(
    settings: Settings, x: Float[Tensor, ...], mu: Callable[[Tensor], Tensor]
) -> Values:
    """Mean centroid over the neighbourhood of ``x``, its variance, and the mean's standard error.

    Args:
        settings: say which neighbourhood, and how many points of it.
        x: what the component reads.
        mu: centroids at points of shape ``(n, *x.shape)``.
    """
    local = mean_over_neighbourhood(
        mu,
        x,
        radius=settings.radius,
        sigma=settings.sigma,
        n_samples=settings.n_samples,
        neighbourhood=settings.neighbourhood,
        centre=settings.centre,
        generator=settings.generator or torch.Generator(x.device).manual_seed(0),
    )
    return {
        "": lambda: local.mean.to(at_least_float32(x)),
        "_variance": lambda: local.variance,
        "_standard_error": lambda: local.standard_error,
    }


def local_values_by_running(
    settings: Settings,
    x: Float[Tensor, ...],
    run: Callable[[Tensor], Tensor],
    v: Float[Tensor, ...],
) -> Values:
    """The same of a component with no closed form, run once a sample and one at a time.

    Args:
        settings: as `local_values`.
        x: what the component reads.
        run: the component, as a function of that.
        v: cotangent, in the shape of what it writes.
    """

    def mu(samples: Tensor) -> Tensor:
        create_graph = settings.create_graph
        return torch.stack([centroid(run, s, v, create_graph=create_graph) for s in samples])

    return local_values(settings, x, mu)
