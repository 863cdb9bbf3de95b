"""Centroids of plain callables: the mathematics, with no toolkit in sight.

Around an input ``x`` a component ``f`` acts like one affine expert ``f(x') = A x' + b``,
exactly inside a linear region of a piecewise-affine network and to first order elsewhere.
Its centroid is the row sum of that expert (Walker et al., "The Linear Centroids
Hypothesis", arXiv 2604.11962)::

    mu_f(x) = J_f(x)^T 1

one vector-Jacobian product. Any other cotangent ``v`` in place of the ones reads the same
expert from another direction: ``J_f(x)^T v``.

Glossary: ``x`` input, ``y = f(x)`` output, ``mu`` centroid, ``v`` cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.cotangents import Cotangent, evaluate
from lch_plugin.errors import InputError, NotDifferentiableError
from lch_plugin.mlp import at_least_float32
from lch_plugin.names import check_known

Neighbourhood = Literal["ball", "gaussian"]

# Rows of x evaluated at once by `local_centroid`: bounds its memory whatever n_samples is.
MAX_ROWS = 4096


@dataclass(frozen=True)
class AffineExpert:
    """The affine map a component applies at each row of ``x``, read through a cotangent.

    The numbers beside the centroid are in at least float32: differences of long sums are rounding
    in half precision.

    Attributes:
        centroid: ``mu = J^T v``, shape and dtype of ``x``.
        offset: ``v . (f(x) - J x)``, one number a row; what the expert adds.
        radius: squared-norm weight of the power-diagram cell, ``|mu|^2 + 2 offset``.
        alignment: cosine of ``mu`` and ``x``.
    """

    centroid: Float[Tensor, "*batch d_in"]
    offset: Float[Tensor, "*batch"]
    radius: Float[Tensor, "*batch"]
    alignment: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class LocalCentroid:
    """Mean centroid over a neighbourhood, and how far the sampled centroids spread around it.

    Attributes:
        mean: mean of the sampled centroids, in the dtype of ``x``.
        variance: unbiased variance of the samples, coordinate by coordinate, in at least
            float32, since squares leave the range of half precision. How much the centroid
            changes over the neighbourhood; it does not shrink with more samples.
        standard_error: ``sqrt(variance / n_samples)``, how far ``mean`` is expected to lie from
            the mean over the whole neighbourhood; it does shrink. In the dtype of ``variance``.
    """

    mean: Float[Tensor, "*batch d_in"]
    variance: Float[Tensor, "*batch d_in"]
    standard_error: Float[Tensor, "*batch d_in"]


def centroid(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    *,
    create_graph: bool = False,
) -> Float[Tensor, "*batch d_in"]:
    """Centroid ``J_fn(x)^T v`` of any callable, by one vector-Jacobian product.

    Rows of ``x`` (everything but its last dimension) are independent items, so one product
    gives the centroid of each. Where ``fn`` mixes rows, the centroid at a row sums over all
    the outputs that row reaches, which is the paper's definition for whole sequences.

    Works under ``no_grad`` and ``inference_mode``, unless a graph is asked for, and leaves the
    ``.grad`` of parameters alone.

    Args:
        fn: any callable or ``nn.Module`` from tensors to tensors.
        x: input, floating point.
        cotangent: ``v``, broadcastable to ``fn(x)``, or from `lch_plugin.cotangents`; all ones if
            None (the paper's centroid).
        create_graph: keep the graph, so that the result can be differentiated again, in ``x`` and
            in the weights of ``fn``. The cotangent counts as a constant.

    Returns:
        The centroid, in the shape and dtype of ``x``; detached without ``create_graph``.

    Raises:
        InputError: ``x`` is not floating point, the cotangent does not fit, is zero or is not
            finite, or a graph is asked for where gradients are off.
        NotDifferentiableError: ``fn(x)`` does not depend differentiably on ``x``.

    Example:
        The centroid of a linear map is the sum of the rows of its matrix, at every input.

        >>> linear = torch.nn.Linear(3, 5)
        >>> mu = lch.centroid(linear, torch.randn(2, 3))
        >>> torch.allclose(mu, linear.weight.sum(0).expand(2, 3))
        True

        With a graph it can be trained: here towards a smaller Jacobian.

        >>> mu = lch.centroid(linear, torch.randn(2, 3), create_graph=True)
        >>> mu.square().sum().backward()
        >>> linear.weight.grad.shape
        torch.Size([5, 3])
    """
    return _vjp(fn, x, cotangent, create_graph=create_graph)[1]


def affine_expert(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    *,
    create_graph: bool = False,
) -> AffineExpert:
    """Affine expert of ``fn`` at each row of ``x``: centroid, offset, radius, alignment.

    The power-diagram reading follows Balestriero et al., "The Geometry of Deep Networks"
    (arXiv 1905.08443), which the LCH paper builds on.

    Args:
        fn: a callable that maps each row of ``x`` on its own.
        x: input, floating point.
        cotangent, create_graph: as `centroid`.

    Raises:
        InputError: as `centroid`, or ``fn`` does not keep the leading dimensions of ``x``.
        NotDifferentiableError: as `centroid`.

    Example:
        Without biases a ReLU network has no offset.

        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 8, bias=False), torch.nn.ReLU())
        >>> expert = lch.affine_expert(mlp, torch.randn(2, 3))
        >>> bool(expert.offset.abs().max() < 1e-5)
        True
    """
    y, mu, v = _vjp(fn, x, cotangent, create_graph=create_graph)
    if y.shape[:-1] != x.shape[:-1]:
        raise InputError(
            f"affine_expert needs one output row an input row, but x has shape {tuple(x.shape)} "
            f"and fn(x) {tuple(y.shape)}. Flatten what fn reads into the last dimension of x."
        )
    offset, radius = offset_and_radius(mu, x, y, v)
    return AffineExpert(
        centroid=mu,
        offset=offset,
        radius=radius,
        alignment=cosine(mu, x),
    )


def offset_and_radius(
    mu: Float[Tensor, "*batch d_in"],
    x: Float[Tensor, "*batch d_in"],
    y: Float[Tensor, "*batch d_out"],
    v: Float[Tensor, "*#batch d_out"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """``v . y - mu . x`` and ``|mu|^2`` plus twice that: the rest of an expert beside its centroid.

    Args:
        mu: centroid.
        x: input.
        y: output.
        v: cotangent.

    Returns:
        Both in at least float32.
    """
    mu, x, y, v = (t.to(at_least_float32(t)) for t in (mu, x, y, v))
    offset = (v * y).sum(-1) - (mu * x).sum(-1)
    return offset, mu.square().sum(-1) + 2 * offset


def cosine(
    mu: Float[Tensor, "*batch d_in"], x: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch"]:
    """Cosine of each centroid and its input, of any size; 0, without a gradient, where one is zero.

    torch's own is a different number for vectors shorter than 1e-8, as centroids may well be.

    Args:
        mu: centroid.
        x: input.

    Returns:
        In at least float32, differentiable in both.
    """

    def scaled(rows: Tensor) -> Tensor:
        rows = rows.to(at_least_float32(rows))
        size = rows.detach().abs().amax(-1, keepdim=True)
        return torch.where(size == 0, rows.detach(), rows) / torch.where(size == 0, 1, size)

    return torch.nn.functional.cosine_similarity(scaled(mu), scaled(x), dim=-1)


@overload
def local_centroid(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    *,
    radius: float | None = None,
    sigma: float | Float[Tensor, ...] | None = None,
    n_samples: int,
    neighbourhood: Neighbourhood = "ball",
    centre: bool = False,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    generator: torch.Generator | None = None,
    statistics: Literal[False] = False,
    create_graph: bool = False,
) -> Float[Tensor, "*batch d_in"]: ...


@overload
def local_centroid(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    *,
    radius: float | None = None,
    sigma: float | Float[Tensor, ...] | None = None,
    n_samples: int,
    neighbourhood: Neighbourhood = "ball",
    centre: bool = False,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    generator: torch.Generator | None = None,
    statistics: Literal[True],
    create_graph: bool = False,
) -> LocalCentroid: ...


@overload
def local_centroid(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    *,
    radius: float | None = None,
    sigma: float | Float[Tensor, ...] | None = None,
    n_samples: int,
    neighbourhood: Neighbourhood = "ball",
    centre: bool = False,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    generator: torch.Generator | None = None,
    statistics: bool,
    create_graph: bool = False,
) -> Float[Tensor, "*batch d_in"] | LocalCentroid: ...


def local_centroid(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    *,
    radius: float | None = None,
    sigma: float | Float[Tensor, ...] | None = None,
    n_samples: int,
    neighbourhood: Neighbourhood = "ball",
    centre: bool = False,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    generator: torch.Generator | None = None,
    statistics: bool = False,
    create_graph: bool = False,
) -> Float[Tensor, "*batch d_in"] | LocalCentroid:
    """Mean centroid over a neighbourhood of each row of ``x``.

    Samples run through ``fn`` stacked along a new first dimension, in chunks of bounded
    memory.

    Args:
        fn: a callable that treats leading dimensions of its input as a batch.
        x: input, floating point.
        radius, sigma, neighbourhood, centre, generator: as `sample_neighbourhood`.
        n_samples: points around each row; at least 2 with ``statistics``.
        cotangent, create_graph: as `centroid`. The graph holds those of all samples.
        statistics: also return the variance of the sampled centroids and the standard error of
            their mean, from the same samples.

    Returns:
        The mean; with ``statistics`` a `LocalCentroid` whose ``mean`` is that same tensor.

    Raises:
        InputError: as `centroid` and `sample_neighbourhood`, or ``statistics`` with fewer than 2
            samples.
        NotDifferentiableError: as `centroid`.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU())
        >>> x = torch.randn(2, 3)
        >>> local = lch.local_centroid(mlp, x, radius=0.25, n_samples=64, statistics=True)
        >>> local.mean.shape, local.variance.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if statistics and n_samples < 2:
        raise InputError(
            f"n_samples={n_samples} has no variance: statistics=True needs at least 2 samples."
        )
    local = mean_over_neighbourhood(
        lambda samples: centroid(fn, samples, cotangent, create_graph=create_graph),
        x,
        radius=radius,
        sigma=sigma,
        n_samples=n_samples,
        neighbourhood=neighbourhood,
        centre=centre,
        generator=generator,
    )
    return local if statistics else local.mean


def mean_over_neighbourhood(
    mu: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    *,
    radius: float | None = None,
    sigma: float | Float[Tensor, ...] | None = None,
    n_samples: int,
    neighbourhood: Neighbourhood = "ball",
    centre: bool = False,
    generator: torch.Generator | None = None,
) -> LocalCentroid:
    """Mean and spread of centroids over a neighbourhood, however they are computed.

    Args:
        mu: centroids at points of shape ``(n, *batch, d_in)``, a chunk at a time.
        x, radius, sigma, n_samples, neighbourhood, centre, generator: as `sample_neighbourhood`; of
            a single sample the variance is zero.

    Raises:
        InputError: as `sample_neighbourhood`.
    """
    _check_sampling(x, radius, sigma, n_samples, neighbourhood)
    # In half precision a long sum would stop growing.
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    spread = Spread()
    chunk = max(1, MAX_ROWS // max(1, x[..., 0].numel()))
    for start in range(0, n_samples, chunk):
        samples = sample_neighbourhood(
            x,
            radius=radius,
            sigma=sigma,
            n_samples=min(chunk, n_samples - start),
            neighbourhood=neighbourhood,
            centre=centre and start == 0,
            generator=generator,
        )
        at_samples = mu(samples)
        total += at_samples.sum(0, dtype=total.dtype)
        spread.update(at_samples.to(total.dtype))
    variance = spread.squares / max(1, n_samples - 1)
    # Where nothing varies, as within a region of a ReLU network, the root has no gradient.
    error = (torch.where(variance == 0, 1, variance) / n_samples).sqrt()
    return LocalCentroid(
        mean=(total / n_samples).to(x.dtype),
        variance=variance,
        standard_error=torch.where(variance == 0, 0, error),
    )


def sample_neighbourhood(
    x: Float[Tensor, "*batch d_in"],
    *,
    radius: float | None = None,
    sigma: float | Float[Tensor, ...] | None = None,
    n_samples: int,
    neighbourhood: Neighbourhood = "ball",
    centre: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n_samples *batch d_in"]:
    """Points around each row of ``x``.

    ``"ball"`` is uniform in the ball of a radius. ``"gaussian"`` adds noise of standard deviation
    ``sigma`` in each coordinate. With a radius that is ``radius / sqrt(d_in)``, so that both put
    points at comparable distances. `docs/explanation/conventions.md` says which of these the
    paper's code uses.

    Args:
        x: input, floating point.
        radius: of the ball, or root-mean-square norm of the Gaussian noise.
        sigma: of the Gaussian noise, in place of a radius: a number, or a tensor that broadcasts to
            ``x``.
        n_samples: points around each row.
        neighbourhood: ``"ball"`` or ``"gaussian"``.
        centre: make ``x`` itself the first of the points, and draw one fewer.
        generator: source of the randomness, on the device of ``x``.

    Raises:
        InputError: radius and sigma both given or neither, a sigma of a ball or one that does not
            broadcast to ``x``, either of them negative or not finite, ``n_samples`` below 1, or a
            neighbourhood that is not one of the two.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> points = lch.sample_neighbourhood(x, radius=0.25, n_samples=64)
        >>> points.shape, bool(points.norm(dim=-1).max() <= 0.25)
        (torch.Size([64, 2, 3]), True)
    """
    _check_sampling(x, radius, sigma, n_samples, neighbourhood)
    shape = (n_samples - centre, *x.shape)
    options: Any = {"dtype": x.dtype, "device": x.device, "generator": generator}
    noise = torch.randn(shape, **options)
    d_in = x.shape[-1]
    if radius is None:
        assert sigma is not None  # There is the one or the other.
        points = x + noise * (sigma.detach().to(x) if isinstance(sigma, Tensor) else sigma)
    elif neighbourhood == "gaussian":
        points = x + noise * (radius / math.sqrt(d_in))
    else:
        # Uniform in a ball: a uniform direction, and a distance whose d-th power is uniform.
        direction = noise / noise.norm(dim=-1, keepdim=True)
        distance = radius * torch.rand((*shape[:-1], 1), **options) ** (1 / d_in)
        points = x + direction * distance
    return torch.cat([x[None], points]) if centre else points


class Spread:
    """Squared deviations from the mean over the first dimension, from chunks of it."""

    def __init__(self) -> None:
        self._n = 0

    def update(self, chunk: Tensor) -> None:
        """Chan, Golub & LeVeque's merge, which never subtracts two large sums of squares."""
        if self._n == 0:
            # Relative to one of the samples, a mean far from zero takes no digits away.
            self._origin = chunk[0].clone()
            self._mean = torch.zeros_like(self._origin)
            self.squares = torch.zeros_like(self._origin)
        m = len(chunk)
        n = self._n + m
        shifted = chunk - self._origin
        mean = shifted.mean(0)
        delta = mean - self._mean
        self.squares += (shifted - mean).square().sum(0) + delta.square() * (self._n * m / n)
        self._mean += delta * (m / n)
        self._n = n


def check_input(x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim == 0:
        raise InputError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}, but a centroid is a derivative in "
            "rows of x: pass floating-point vectors (for tokens, their embeddings)."
        )


def check_neighbourhood(
    radius: float | None, sigma: float | Tensor | None, neighbourhood: str
) -> None:
    """Refuse a neighbourhood that is none, or not said in one way.

    Raises:
        InputError: as `sample_neighbourhood`.
    """
    check_known("neighbourhood", neighbourhood, get_args(Neighbourhood))
    if (radius is None) == (sigma is None):
        raise InputError(
            f"radius={radius} and sigma={sigma}: a neighbourhood has the one or the other. Give a "
            "radius, or with neighbourhood='gaussian' the sigma of each coordinate."
        )
    if sigma is not None and neighbourhood != "gaussian":
        raise InputError(
            f"sigma={sigma} is of Gaussian noise, which neighbourhood={neighbourhood!r} has not. "
            "Pass neighbourhood='gaussian', or a radius in its place."
        )
    for name, value in (("radius", radius), ("sigma", sigma)):
        if value is None:
            continue
        size = torch.as_tensor(value)
        if not bool((size.isfinite() & (size >= 0)).all()):
            raise InputError(f"{name}={value} must be a finite number, zero or more.")


def _check_sampling(
    x: Tensor,
    radius: float | None,
    sigma: float | Tensor | None,
    n_samples: int,
    neighbourhood: str,
) -> None:
    check_input(x)
    check_neighbourhood(radius, sigma, neighbourhood)
    if n_samples < 1:
        raise InputError(f"n_samples={n_samples} must be at least 1.")
    if isinstance(sigma, Tensor):
        try:
            fits = torch.broadcast_shapes(sigma.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"sigma has shape {tuple(sigma.shape)} and x {tuple(x.shape)}: sigma has to "
                "broadcast to x. Give a number, or one for each coordinate."
            )


def _vjp(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    cotangent: Tensor | Cotangent | None,
    *,
    create_graph: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(fn(x), J^T v, v)``, all detached unless a graph is asked for."""
    check_input(x)
    if create_graph:
        check_gradients_on()
    # A tensor made under inference_mode can never require grad; a copy made outside can.
    with torch.inference_mode(False), torch.enable_grad():
        if create_graph and x.requires_grad:
            leaf = x
        else:
            leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        y = fn(leaf)
        if not isinstance(y, Tensor):
            raise InputError(
                f"fn returned {type(y).__name__}, not a tensor. Wrap it so that it returns the "
                "one tensor whose centroid you want."
            )
        v = fit_cotangent(cotangent, y)
        if not y.requires_grad:
            raise NotDifferentiableError(NO_PATH)
        (mu,) = torch.autograd.grad(y, leaf, v, allow_unused=True, create_graph=create_graph)
    if mu is None:
        raise NotDifferentiableError(NO_PATH)
    return y if create_graph else y.detach(), mu, v


def check_gradients_on() -> None:
    """Refuse to keep a graph where none is built.

    Raises:
        InputError: gradients are off.
    """
    if not torch.is_grad_enabled():
        raise InputError(
            "create_graph=True keeps the graph of a centroid, and gradients are off. Run it "
            "without torch.no_grad() and torch.inference_mode() around it."
        )


NO_PATH = (
    "fn(x) does not depend differentiably on x: no gradient path leads back to it. Look for "
    "detach(), integer casts, argmax, or a fn that ignores its argument."
)


def fit_cotangent(cotangent: Tensor | Cotangent | None, y: Tensor) -> Tensor:
    """Cotangent expanded to the shape, dtype and device of ``y``; all ones if None."""
    if cotangent is None:
        return torch.ones_like(y)
    if isinstance(cotangent, Cotangent):
        return evaluate(cotangent, y).to(y).expand_as(y)
    if not isinstance(cotangent, Tensor):
        raise InputError(
            f"cotangent is a {type(cotangent).__name__}; pass a tensor, or an object with a `name` "
            "and a method `at(y)`, as those of lch_plugin.cotangents that need no model."
        )
    try:
        v = cotangent.detach().to(y).expand_as(y)
    except RuntimeError as error:
        raise InputError(
            f"cotangent of shape {tuple(cotangent.shape)} does not broadcast to the output of "
            f"fn, shape {tuple(y.shape)}: a cotangent lives in the output space."
        ) from error
    if not bool(v.isfinite().all()) or not bool(v.any()):
        raise InputError("cotangent must be finite and not all zeros.")
    return v
