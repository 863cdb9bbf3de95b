"""How far a centroid can be trusted, and how many directions a cloud of centroids fills.

`linearity_error` measures how fast a component leaves the affine expert that its centroid
summarises. `effective_dimension` and `PointCloud` measure how many directions a set of points
(centroids, activations) spreads over, the latter from batches that need not fit in memory
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.centroids import MAX_ROWS, NO_PATH, check_input
from lch_plugin.errors import InputError, NotDifferentiableError


def linearity_error(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    radii: Sequence[float],
    *,
    n_directions: int = 16,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n_radii *batch"]:  # noqa: UP037 (reads the shape as a product)
    """Relative error of the affine expert of ``fn`` at each row of ``x``, radius by radius.

    The mean over random displacements ``d``, uniform on the sphere of radius ``r``, of::

        |f(x + d) - f(x) - J d| / |f(x + d) - f(x)|

    with norms over the last dimension of the output, and ``J`` the Jacobian of the row. It is
    zero while the sphere stays inside one linear region of a ReLU network and shrinks in
    proportion to ``r`` for a smooth ``fn``. A direction that changes nothing and is predicted to
    change nothing (0/0) counts as 0; one that changes nothing although ``J d`` is not zero makes
    the mean infinite.

    Everything is computed in the dtype of ``x``. Small radii therefore stop telling anything:
    rounding of ``x + d`` and of ``f`` leaves about ``eps (|x| + |f| / |J|) / r``, with ``eps``
    1e-7 in float32 and 2e-16 in float64.

    Works under ``no_grad`` and ``inference_mode``, builds no graph, and evaluates directions in
    chunks of bounded memory. The result does not depend on the chunks beyond rounding.

    Args:
        fn: a callable that maps each row of its input on its own, whatever the leading
            dimensions, out of operations that PyTorch can differentiate in forward mode.
        x: input, floating point.
        radii: distances from ``x``. All of them use the same directions, so that the errors of
            one row form a curve.
        n_directions: directions drawn for each row.
        generator: source of the randomness, on the device of ``x``.

    Returns:
        The errors, zero or more, in the dtype of ``x``.

    Raises:
        InputError: ``x`` is not floating point; radii are missing or not positive and finite;
            ``n_directions`` is below 1; or ``fn`` does not keep the leading dimensions.
        NotDifferentiableError: ``fn(x)`` does not depend differentiably on ``x``.
    """
    check_input(x)
    radii = [float(r) for r in radii]
    if len(radii) == 0:
        raise InputError("radii is empty: pass the distances at which to measure the error.")
    for r in radii:
        if not (math.isfinite(r) and r > 0):
            raise InputError(f"radii contains {r}: each must be a finite number above zero.")
    if n_directions < 1:
        raise InputError(f"n_directions={n_directions} must be at least 1.")

    # A tensor made under inference_mode cannot carry a derivative; copies made outside can.
    with torch.inference_mode(False), torch.no_grad():
        total = torch.zeros(
            (len(radii), *x.shape[:-1]),
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        chunk = max(1, MAX_ROWS // max(1, x[..., 0].numel()))
        for start in range(0, n_directions, chunk):
            # Drawn one by one, so that a seed gives the same directions whatever the chunk.
            directions = torch.stack(
                [_unit_directions(x, generator) for _ in range(min(chunk, n_directions - start))]
            )
            centre = x.expand_as(directions).clone()
            y, slope = _value_and_derivative(fn, centre, directions)
            for i, r in enumerate(radii):
                change = fn(centre + r * directions) - y
                error = (change - r * slope).norm(dim=-1)
                ratio = torch.where(error == 0, 0, error / change.norm(dim=-1))
                total[i] += ratio.sum(0, dtype=total.dtype)
        return (total / n_directions).to(x.dtype)


def effective_dimension(points: Float[Tensor, "n d"]) -> float:
    """Number of directions the points spread over: 1 on a line, ``d`` for an even cloud.

    The exponential of the Shannon entropy of ``p = eigenvalues of the covariance / their sum``,
    which is the effective rank of Roy & Vetterli (2007) applied to the covariance. It does not
    change when the points are shifted, rotated, reordered or scaled all alike. An estimate from
    few points is too low, since ``n`` points span at most ``n - 1`` directions.

    For points that do not fit in memory together, see `PointCloud`.

    Args:
        points: one point a row.

    Returns:
        A number between 1 and ``min(n - 1, d)``.

    Raises:
        InputError: as `PointCloud.update` and `PointCloud.effective_dimension`: fewer than 2
            points, points that are not finite, or all points equal.
    """
    cloud = PointCloud()
    cloud.update(points)
    return cloud.effective_dimension


class PointCloud:
    """Mean, covariance and effective dimension of points that arrive in batches.

    Holds one ``(d, d)`` matrix however many points it has seen, and gives what all of them
    together would give, in whatever batches and order they came. Sums are kept in float64, on
    the device of the first points (on the CPU for a device without float64).

    >>> cloud = PointCloud()
    >>> cloud.update(torch.eye(3))
    >>> cloud.n, round(cloud.effective_dimension, 6)
    (3, 2.0)
    """

    def __init__(self) -> None:
        self._n = 0
        # Everything is kept relative to the first point: a far-off cloud loses no digits, and
        # equal points have a scatter of exactly zero.
        self._origin = torch.empty(0)
        self._mean = torch.empty(0)
        self._scatter = torch.empty(0)

    def update(self, points: Float[Tensor, "*batch d"]) -> None:
        """Add points. Each vector along the last dimension is one point; none at all is fine.

        Raises:
            InputError: points are not finite floating-point vectors, or have another length
                than those before. The cloud is then left as it was.
        """
        self._check(points)
        with torch.inference_mode(False), torch.no_grad():
            rows = points.detach().reshape(-1, points.shape[-1])
            if len(rows) == 0:
                return
            if self._n == 0:
                device = torch.device("cpu") if rows.device.type == "mps" else rows.device
                self._origin = rows[0].to(device).double().clone()
                self._mean = torch.zeros_like(self._origin)
                self._scatter = self._origin.new_zeros(len(self._origin), len(self._origin))
            # The float64 copy is made chunk by chunk, so it stays small for a large batch.
            for part in rows.split(MAX_ROWS):
                self._merge(part.to(self._origin.device).double() - self._origin)

    def _merge(self, rows: Tensor) -> None:
        """Merge rows, relative to the origin, into the sums: Chan, Golub & LeVeque's update."""
        m = len(rows)
        n = self._n + m
        mean = rows.mean(0)
        delta = mean - self._mean
        centred = rows - mean
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(delta, delta, alpha=self._n * m / n)
        self._mean += delta * (m / n)
        self._n = n

    def _check(self, points: Tensor) -> None:
        if not points.is_floating_point() or points.ndim == 0 or points.shape[-1] == 0:
            raise InputError(
                f"points have shape {tuple(points.shape)} and dtype {points.dtype}: pass "
                "floating-point vectors, one along the last dimension for each point."
            )
        if self._n > 0 and points.shape[-1] != len(self._origin):
            raise InputError(
                f"points have {points.shape[-1]} coordinates, but the {self._n} points before "
                f"them have {len(self._origin)}. Use one PointCloud for each space."
            )
        n_bad = int((~points.isfinite()).any(-1).sum())
        if n_bad > 0:
            raise InputError(
                f"{n_bad} of {points[..., 0].numel()} points have coordinates that are not finite "
                "(NaN or infinite). Leave them out, or look for what overflowed."
            )

    @property
    def n(self) -> int:
        """Points seen so far."""
        return self._n

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the points, in float64.

        Raises:
            InputError: no points yet.
        """
        self._need(1, "mean")
        return self._origin + self._mean

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Unbiased covariance of the points, in float64.

        Raises:
            InputError: fewer than 2 points.
        """
        self._need(2, "covariance")
        return self._scatter / (self._n - 1)

    @property
    def effective_dimension(self) -> float:
        """Number of directions the points spread over, as the function of the same name.

        Takes one eigenvalue decomposition: time ``O(d^3)``, seconds for thousands of dimensions.

        Raises:
            InputError: fewer than 2 points, all of them equal, or variance that overflows.
        """
        self._need(2, "effective dimension")
        total = float(self._scatter.trace())
        if total == 0:
            raise InputError(
                f"All {self._n} points are equal (total variance 0), so they spread over no "
                "direction: pass points that differ."
            )
        if not math.isfinite(total):
            raise InputError(
                "The variance of the points overflows float64: divide them by their largest "
                "absolute value, which does not change the effective dimension."
            )
        # Rounding leaves eigenvalues that should be zero slightly to either side of it.
        p = torch.linalg.eigvalsh(self._scatter / total).clamp_min(0)
        p = p / p.sum()
        entropy = float(torch.special.entr(p).sum())
        return min(max(math.exp(entropy), 1.0), float(min(self._n - 1, len(p))))

    def _need(self, n: int, what: str) -> None:
        if self._n < n:
            raise InputError(
                f"The {what} needs {n} or more points, but there are {self._n}: add some with "
                "update()."
            )


def _unit_directions(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """One direction a row of ``x``, uniform on the unit sphere."""
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return noise / noise.norm(dim=-1, keepdim=True)


def _value_and_derivative(
    fn: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """``(f(x), J d)`` by forward mode."""

    def checked(x: Tensor) -> Tensor:
        y = fn(x)
        if not isinstance(y, Tensor):
            raise InputError(
                f"fn returned {type(y).__name__}, not a tensor. Wrap it so that it returns the "
                "one tensor whose linearity you want to know."
            )
        if y.shape[:-1] != x.shape[:-1]:
            raise InputError(
                f"linearity_error needs one output row an input row, but fn made shape "
                f"{tuple(y.shape)} of {tuple(x.shape)} (directions first). Flatten what fn reads "
                "into the last dimension of x, and let it treat all others as a batch."
            )
        return y

    try:
        y, slope = torch.func.jvp(checked, (x,), (direction,), strict=True)  # type: ignore[misc]
    except RuntimeError as error:
        if "independent of the inputs" not in str(error):
            raise
        raise NotDifferentiableError(NO_PATH) from error
    return y, slope
