"""Diagnostics, held to closed forms and to invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lch_plugin as lch
from lch_plugin import diagnostics
from lch_plugin.diagnostics import PointCloud, effective_dimension, linearity_error


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _network(act: nn.Module, d_in: int = 5, d_hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_hidden), act, nn.Linear(d_hidden, 4)).double()


# linearity_error


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), d_in=st.integers(1, 6), share=st.floats(0.1, 0.99))
def test_a_relu_network_is_linear_inside_its_region(seed: int, d_in: int, share: float) -> None:
    torch.manual_seed(seed)
    fn, x = _network(nn.ReLU(), d_in), torch.randn(64, d_in, dtype=torch.float64)
    # Distance from each row to the nearest hyperplane at which a hidden unit switches.
    distance = (fn[0](x).abs() / fn[0].weight.norm(dim=-1)).min(-1).values.detach()
    row = distance.argmax()
    # Closer to a boundary than this, the rounding of f alone is 1e-12 of its change.
    assume(float(distance[row]) > 0.02)
    inside = linearity_error(fn, x[row], [share * float(distance[row])], generator=_generator(seed))
    assert inside.item() < 1e-12


def test_a_relu_network_is_not_linear_across_regions() -> None:
    torch.manual_seed(0)
    fn, x = _network(nn.ReLU()), torch.randn(20, 5, dtype=torch.float64)
    assert (linearity_error(fn, x, [5.0], generator=_generator()) > 0.01).all()


@pytest.mark.parametrize("act", [nn.GELU(), nn.Tanh()])
def test_smooth_networks_deviate_in_proportion_to_the_radius(act: nn.Module) -> None:
    torch.manual_seed(0)
    fn, x = _network(act), torch.randn(20, 5, dtype=torch.float64)
    far, near = linearity_error(fn, x, [1e-3, 1e-4], generator=_generator())
    torch.testing.assert_close(far / near, torch.full_like(far, 10), rtol=0.05, atol=0)


@settings(deadline=None, max_examples=30)
@given(x=st.floats(0.5, 10), r=st.floats(0.02, 0.4), seed=st.integers(0, 2**31))
def test_error_of_a_square_is_the_closed_form(x: float, r: float, seed: int) -> None:
    # (x ± r)^2 - x^2 = ±2xr + r^2, of which r^2 is the remainder.
    point = torch.tensor([x], dtype=torch.float64)
    error = linearity_error(torch.square, point, [r], n_directions=1, generator=_generator(seed))
    expected = min((r / (2 * x + r), r / (2 * x - r)), key=lambda e: abs(e - error.item()))
    # Rounding of x^2 is 1e-10 of the smallest r^2.
    assert error.item() == pytest.approx(expected, rel=1e-8)


def test_errors_agree_with_dense_jacobians() -> None:
    torch.manual_seed(0)
    fn, x = _network(nn.Tanh()), torch.randn(3, 5, dtype=torch.float64)
    again, expected = _generator(), torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(7):
        directions = torch.randn(3, 5, dtype=torch.float64, generator=again)
        for i, r in enumerate((0.1, 2.0)):
            for j, row in enumerate(x):
                d = r * directions[j] / directions[j].norm()
                change = fn(row + d) - fn(row)
                slope = torch.autograd.functional.jacobian(fn, row) @ d
                expected[i, j] += ((change - slope).norm() / change.norm()).detach() / 7
    errors = linearity_error(fn, x, [0.1, 2.0], n_directions=7, generator=_generator())
    torch.testing.assert_close(errors, expected, rtol=1e-10, atol=0)


def test_no_change_at_all_counts_as_linear_and_an_unpredicted_standstill_as_infinite() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.constant_(dead[0].bias, -100)
    assert (linearity_error(dead, x, [0.1], generator=_generator()) == 0).all()
    # f(x) = x - x^3 comes back to its start at x = ±1, with slope 1 at 0.
    point = torch.zeros(1, dtype=torch.float64)
    returning = linearity_error(lambda x: x - x**3, point, [1.0], generator=_generator())
    assert returning.item() == math.inf


def test_errors_do_not_depend_on_the_chunks_or_on_other_radii_or_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    fn, x = _network(nn.Tanh()), torch.randn(2, 3, 5, dtype=torch.float64)
    options = {"n_directions": 10}
    errors = linearity_error(fn, x, [0.1, 1.0], generator=_generator(), **options)
    assert errors.shape == (2, 2, 3)
    alone = linearity_error(fn, x, [1.0], generator=_generator(), **options)
    torch.testing.assert_close(alone[0], errors[1], rtol=1e-12, atol=0)
    for max_rows in (1, 6, 24):  # 1, 1 and 4 directions a chunk.
        monkeypatch.setattr(diagnostics, "MAX_ROWS", max_rows)
        chunked = linearity_error(fn, x, [0.1, 1.0], generator=_generator(), **options)
        torch.testing.assert_close(chunked, errors, rtol=1e-10, atol=1e-14)


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "MAX_ROWS", 8)
    largest = 0

    def fn(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x[..., 0].numel())
        return x.square()

    linearity_error(fn, torch.ones(2, 3), [0.1], n_directions=100, generator=_generator())
    assert largest == 8


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_linearity_error_works_in_every_grad_mode_and_is_reproducible(mode: type) -> None:
    torch.manual_seed(0)
    fn = _network(nn.GELU())
    with mode():
        x = torch.randn(3, 5, dtype=torch.float64)
        before = torch.get_rng_state()
        errors = linearity_error(fn, x, [0.5], generator=_generator(3))
        assert torch.equal(torch.get_rng_state(), before)
    assert not errors.requires_grad
    assert not errors.is_inference()
    assert torch.equal(errors, linearity_error(fn, x, [0.5], generator=_generator(3)))
    assert not torch.equal(errors, linearity_error(fn, x, [0.5], generator=_generator(4)))
    assert all(p.grad is None and p.requires_grad for p in fn.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_come_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fn, x = _network(nn.Tanh()), torch.randn(3, 5, dtype=torch.float64)
    errors = linearity_error(fn.to(dtype), x.to(dtype), [1.0], n_directions=256)
    assert errors.dtype == dtype
    expected = linearity_error(fn.double(), x, [1.0], n_directions=256)
    torch.testing.assert_close(errors.double(), expected, rtol=0.3, atol=0)


@pytest.mark.usefixtures("as_users_run")
def test_linearity_error_refuses_bad_input_with_the_reason() -> None:
    fn, x = _network(nn.GELU()), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(lch.InputError, match="int64"):
        linearity_error(fn, torch.ones(2, 5, dtype=torch.int64), [1.0])
    with pytest.raises(lch.InputError, match="radii is empty"):
        linearity_error(fn, x, [])
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(lch.InputError, match=f"radii contains {bad}"):
            linearity_error(fn, x, [1.0, bad])
    with pytest.raises(lch.InputError, match="n_directions=0"):
        linearity_error(fn, x, [1.0], n_directions=0)
    for mixing in (lambda x: x.sum(-1), lambda x: x.sum(), lambda x: x.flatten(0, 1)):
        with pytest.raises(lch.InputError, match="one output row"):
            linearity_error(mixing, x, [1.0])
    with pytest.raises(lch.InputError, match="tuple"):
        linearity_error(lambda x: (x, x), x, [1.0])
    for flat in (lambda x: x.detach(), lambda x: x.argmax(-1, keepdim=True).double()):
        with pytest.raises(lch.NotDifferentiableError):
            linearity_error(flat, x, [1.0])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        linearity_error(fn, x[:, :4], [1.0])


# effective_dimension and PointCloud


def _cloud_with_spectrum(spectrum: list[float], seed: int, n_extra: int = 3) -> torch.Tensor:
    """Points whose covariance has exactly these eigenvalues (up to scale), in random axes."""
    generator, d = _generator(seed), len(spectrum)
    n = d + 1 + n_extra
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
    # Orthonormal columns that sum to zero: their covariance is the identity over n - 1.
    columns = torch.linalg.qr(noise - noise.mean(0)).Q
    axes = _rotation(d, generator)
    return columns * torch.tensor(spectrum, dtype=torch.float64).sqrt() @ axes.T


def _rotation(d: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q


@settings(deadline=None, max_examples=50)
@given(spectrum=st.lists(st.floats(0, 100), min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_effective_dimension_of_a_known_spectrum(spectrum: list[float], seed: int) -> None:
    total = sum(spectrum)
    assume(total > 1e-3)
    expected = math.exp(-sum(v / total * math.log(v / total) for v in spectrum if v / total > 0))
    found = effective_dimension(_cloud_with_spectrum(spectrum, seed))
    assert found == pytest.approx(expected, rel=1e-10)
    assert 1 <= found <= len(spectrum)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_effective_dimension_of_a_gaussian_in_k_of_d_dimensions(k: int) -> None:
    generator = _generator(k)
    flat = torch.randn(20_000, k, dtype=torch.float64, generator=generator)
    points = flat @ _rotation(16, generator)[:k] + 5
    assert effective_dimension(points) == pytest.approx(k, rel=2e-3)


def test_effective_dimension_of_few_points_is_at_most_their_number_less_one() -> None:
    points = torch.randn(4, 50, generator=_generator())
    assert 2 < effective_dimension(points) <= 3
    assert effective_dimension(points[:2]) == 1
    corners = torch.eye(4)  # A regular simplex: even in its three dimensions.
    assert effective_dimension(corners) == pytest.approx(3, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 6),
    scale=st.floats(1e-6, 1e6),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 2**31),
)
def test_effective_dimension_ignores_rotation_scale_shift_and_order(
    n: int, d: int, scale: float, shift: float, seed: int
) -> None:
    generator = _generator(seed)
    points = torch.randn(n, d, dtype=torch.float64, generator=generator)
    expected = effective_dimension(points)
    order = torch.randperm(n, generator=generator)
    moved = scale * (points[order] @ _rotation(d, generator) + shift)
    assert effective_dimension(moved) == pytest.approx(expected, rel=1e-9)
    assert 1 <= expected <= min(n - 1, d)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8),
    d=st.integers(1, 5),
    offset=st.floats(-1e4, 1e4),
    max_rows=st.integers(1, 10),
    seed=st.integers(0, 2**31),
)
def test_any_split_into_batches_gives_the_same_cloud(
    sizes: list[int], d: int, offset: float, max_rows: int, seed: int
) -> None:
    n = sum(sizes)
    assume(n >= 2)
    points = offset + torch.randn(n, d, dtype=torch.float64, generator=_generator(seed))
    split, whole = PointCloud(), PointCloud()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "MAX_ROWS", max_rows)
        for batch in points.split(sizes):
            split.update(batch)
    whole.update(points)
    assert split.n == whole.n == n
    torch.testing.assert_close(split.mean, points.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.mean, points.mean(0), rtol=1e-12, atol=1e-12)
    expected = points.T.cov().reshape(d, d)
    for cloud in (split, whole):
        # torch.cov rounds the far-off mean; the cloud works relative to a point of its own.
        torch.testing.assert_close(cloud.covariance, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(split.covariance, whole.covariance, rtol=1e-10, atol=1e-12)
    assert split.effective_dimension == pytest.approx(whole.effective_dimension, rel=1e-10)


def test_a_cloud_far_from_zero_loses_no_digits() -> None:
    near = torch.randn(1000, 3, dtype=torch.float64, generator=_generator())
    near = (near * 2**20).round() / 2**20  # So that adding a power of two rounds nothing.
    cloud = PointCloud()
    for batch in (near + 2.0**32).split(7):
        cloud.update(batch)
    torch.testing.assert_close(cloud.covariance, near.T.cov(), rtol=1e-12, atol=1e-14)


def test_leading_dimensions_single_points_and_half_precision() -> None:
    points = torch.randn(4, 6, 3, generator=_generator()).bfloat16()
    cloud = PointCloud()
    with torch.inference_mode():
        cloud.update(points[:2].clone())
    cloud.update(points[2:].requires_grad_())
    cloud.update(torch.zeros(3))
    cloud.update(torch.zeros(0, 3))
    everything = torch.cat([points.detach().double().reshape(-1, 3), torch.zeros(1, 3)])
    assert cloud.n == 25
    assert cloud.mean.dtype == cloud.covariance.dtype == torch.float64
    assert not cloud.covariance.requires_grad
    torch.testing.assert_close(cloud.mean, everything.mean(0))
    torch.testing.assert_close(cloud.covariance, everything.T.cov())


def test_memory_of_a_cloud_does_not_grow_with_its_points() -> None:
    cloud, sizes = PointCloud(), set()
    for seed in range(5):
        cloud.update(torch.randn(1000, 4, generator=_generator(seed)))
        held = [v for v in vars(cloud).values() if isinstance(v, torch.Tensor)]
        sizes.add(sum(v.untyped_storage().nbytes() for v in held))
    assert sizes == {8 * (4 * 4 + 2 * 4)}


def test_what_a_cloud_returns_is_not_its_own_state() -> None:
    cloud = PointCloud()
    cloud.update(torch.eye(3))
    before = cloud.covariance
    cloud.mean.zero_()
    cloud.covariance.zero_()
    cloud.update(torch.zeros(0, 3))
    assert torch.equal(cloud.covariance, before)
    assert cloud.mean.sum() == pytest.approx(1)


@pytest.mark.usefixtures("as_users_run")
def test_a_cloud_refuses_bad_input_and_stays_as_it_was() -> None:
    cloud = PointCloud()
    for what in ("mean", "covariance", "effective_dimension"):
        with pytest.raises(lch.InputError, match="there are 0"):
            getattr(cloud, what)
    cloud.update(torch.ones(1, 3))
    with pytest.raises(lch.InputError, match="2 or more points, but there are 1"):
        _ = cloud.covariance
    cloud.update(torch.eye(3))
    before = (cloud.n, cloud.mean, cloud.covariance)
    bad_points = torch.randn(5, 3)
    bad_points[1, 0], bad_points[1, 2], bad_points[4, 1] = math.nan, math.inf, -math.inf
    for bad, reason in (
        (bad_points, "2 of 5 points"),
        (torch.ones(2, 4), "4 coordinates, but the 4 points before"),
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.ones(2, 0), "shape"),
        (torch.tensor(1.0), "shape"),
    ):
        with pytest.raises(lch.InputError, match=reason):
            cloud.update(bad)
    assert cloud.n == before[0]
    assert torch.equal(cloud.mean, before[1])
    assert torch.equal(cloud.covariance, before[2])


@pytest.mark.usefixtures("as_users_run")
def test_effective_dimension_refuses_bad_input_with_the_reason() -> None:
    with pytest.raises(lch.InputError, match="there are 1"):
        effective_dimension(torch.ones(1, 3))
    with pytest.raises(lch.InputError, match="1 of 2 points"):
        effective_dimension(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    # A third is not a binary fraction, so a mean of thirds is rounded.
    for constant in (0.0, 1 / 3, 1e6 / 3):
        with pytest.raises(lch.InputError, match="All 7 points are equal"):
            effective_dimension(torch.full((7, 3), constant, dtype=torch.float64))
    with pytest.raises(lch.InputError, match="overflows"):
        effective_dimension(torch.eye(3, dtype=torch.float64) * 1e200)
