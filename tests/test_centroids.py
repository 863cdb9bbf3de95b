"""The mathematics on plain callables, held to dense Jacobians in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lch_plugin as lch
from lch_plugin import centroids
from lch_plugin.centroids import LocalCentroid


def _network(d_in: int = 5, d_out: int = 4, act: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(d_in, 8), act or nn.GELU(), nn.Linear(8, d_out)).double()


def _jacobians(fn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(rows, d_out, d_in), one dense Jacobian a row."""
    return torch.stack([torch.autograd.functional.jacobian(fn, row) for row in x])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), scale=st.floats(0.01, 10))
def test_centroid_is_the_row_sum_of_the_jacobian(seed: int, rows: int, scale: float) -> None:
    torch.manual_seed(seed)
    fn, x = _network(), torch.randn(rows, 5, dtype=torch.float64) * scale
    expected = _jacobians(fn, x).sum(1)
    torch.testing.assert_close(lch.centroid(fn, x), expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_centroid_is_linear_in_the_cotangent(seed: int, a: float, b: float) -> None:
    torch.manual_seed(seed)
    fn, x = _network(), torch.randn(3, 5, dtype=torch.float64)
    v, w = torch.randn(2, 4, dtype=torch.float64)
    if not (a * v + b * w).any():
        return
    combined = a * lch.centroid(fn, x, v) + b * lch.centroid(fn, x, w)
    torch.testing.assert_close(lch.centroid(fn, x, a * v + b * w), combined, rtol=1e-9, atol=1e-11)


def test_linear_map_has_its_column_sums_as_centroid_everywhere() -> None:
    fn = nn.Linear(6, 3).double()
    mu = lch.centroid(fn, torch.randn(4, 6, dtype=torch.float64))
    torch.testing.assert_close(mu, fn.weight.detach().sum(0).expand(4, 6))


def test_expert_of_a_relu_network_is_exact_inside_its_region() -> None:
    torch.manual_seed(0)
    fn, x = _network(act=nn.ReLU()), torch.randn(20, 5, dtype=torch.float64)
    expert = lch.affine_expert(fn, x)
    nearby = x + 1e-6 * torch.randn_like(x)
    same_region = ((fn[0](x) > 0) == (fn[0](nearby) > 0)).all(-1)
    assert same_region.sum() > 10
    predicted = (expert.centroid * nearby).sum(-1) + expert.offset
    torch.testing.assert_close(predicted[same_region], fn(nearby).sum(-1)[same_region].detach())


def test_expert_radius_and_alignment_follow_their_definitions() -> None:
    torch.manual_seed(0)
    fn, x = _network(), torch.randn(3, 5, dtype=torch.float64)
    expert = lch.affine_expert(fn, x, torch.tensor([1.0, -1.0, 0.5, 2.0]))
    mu = expert.centroid
    torch.testing.assert_close(expert.radius, (mu**2).sum(-1) + 2 * expert.offset)
    torch.testing.assert_close(
        expert.alignment, (mu * x).sum(-1) / (mu.norm(dim=-1) * x.norm(dim=-1))
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_centroid_works_in_every_grad_mode_and_leaves_parameters_alone(mode: type) -> None:
    torch.manual_seed(0)
    fn = _network()
    with mode():
        x = torch.randn(3, 5, dtype=torch.float64)
        mu = lch.centroid(fn, x)
    torch.testing.assert_close(mu, _jacobians(fn, x.clone()).sum(1))
    assert not mu.requires_grad
    assert all(p.grad is None and p.requires_grad for p in fn.parameters())


@pytest.mark.parametrize("neighbourhood", ["ball", "gaussian"])
def test_samples_keep_to_their_neighbourhood(neighbourhood: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, dtype=torch.float64)
    samples = lch.sample_neighbourhood(
        x, radius=0.5, n_samples=4000, neighbourhood=neighbourhood, generator=generator
    )
    distance = (samples - x).norm(dim=-1)
    if neighbourhood == "ball":
        # P(distance < r) = (r / radius)^d for a uniform point of the ball.
        assert distance.max() <= 0.5
        share = (distance < 0.5 * 0.9).double().mean()
        assert abs(share - 0.9**16) < 0.02
    else:
        assert abs(distance.square().mean().sqrt() - 0.5) < 0.01


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_a_sigma_is_of_each_coordinate(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    sigma = 0.1 + torch.rand(shape, dtype=torch.float64)
    options = {"n_samples": 20_000, "neighbourhood": "gaussian"}
    samples = lch.sample_neighbourhood(
        x, sigma=sigma, generator=torch.Generator().manual_seed(0), **options
    )
    spread = (samples - x).square().mean(0).sqrt()
    torch.testing.assert_close(spread, sigma.expand(2, 3), rtol=0.03, atol=0)


def test_a_gaussian_of_a_radius_is_one_of_a_sigma() -> None:
    x = torch.randn(2, 16, dtype=torch.float64)
    of_radius, of_sigma, of_tensor = (
        lch.sample_neighbourhood(
            x,
            n_samples=3,
            neighbourhood="gaussian",
            generator=torch.Generator().manual_seed(0),
            **size,
        )
        for size in (
            {"radius": 0.1},
            {"sigma": 0.1 / 4},
            {"sigma": torch.tensor(0.1 / 4, dtype=torch.float64, requires_grad=True)},
        )
    )
    torch.testing.assert_close(of_sigma, of_radius, rtol=1e-14, atol=1e-14)
    assert torch.equal(of_tensor, of_sigma)
    assert not of_tensor.requires_grad


@pytest.mark.parametrize("neighbourhood", ["ball", "gaussian"])
def test_the_centre_is_the_first_point_in_the_place_of_one_drawn(neighbourhood: str) -> None:
    x = torch.randn(2, 5, dtype=torch.float64)

    def points(n_samples: int, centre: bool) -> torch.Tensor:
        return lch.sample_neighbourhood(
            x,
            radius=0.3,
            n_samples=n_samples,
            neighbourhood=neighbourhood,
            centre=centre,
            generator=torch.Generator().manual_seed(0),
        )

    assert torch.equal(points(4, True), torch.cat([x[None], points(3, False)]))
    assert torch.equal(points(1, True), x[None])


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_local_centroid_tends_to_the_plain_one(seed: int) -> None:
    torch.manual_seed(seed)
    fn, x = _network(), torch.randn(2, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    local = lch.local_centroid(fn, x, radius=1e-7, n_samples=3, generator=generator)
    torch.testing.assert_close(local, lch.centroid(fn, x), rtol=1e-5, atol=1e-6)


def test_local_centroid_is_the_mean_over_its_samples_whatever_the_chunks() -> None:
    torch.manual_seed(0)
    fn, x = _network(), torch.randn(1500, 5, dtype=torch.float64)  # Two samples fit a chunk.
    options = {"radius": 0.3, "n_samples": 5}
    local = lch.local_centroid(fn, x, generator=torch.Generator().manual_seed(7), **options)
    again = torch.Generator().manual_seed(7)
    chunks = [
        lch.sample_neighbourhood(x, radius=0.3, n_samples=n, generator=again) for n in (2, 2, 1)
    ]
    expected = lch.centroid(fn, torch.cat(chunks)).mean(0)
    torch.testing.assert_close(local, expected)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e30])
def test_alignment_does_not_depend_on_the_size_of_a_centroid(size: float) -> None:
    torch.manual_seed(0)
    fn, x = nn.Linear(5, 3), torch.randn(4, 5)
    expected = lch.affine_expert(fn, x).alignment
    found = lch.affine_expert(lambda x: size * fn(x), x).alignment
    torch.testing.assert_close(found, expected)
    assert not lch.affine_expert(lambda x: 0 * fn(x), x).alignment.any()


def test_an_expert_in_half_precision_has_its_numbers_in_float32() -> None:
    torch.manual_seed(0)
    fn = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).bfloat16()
    x = 3 * torch.randn(16, 64).bfloat16()
    expert = lch.affine_expert(fn, x)
    y, mu, wide = fn(x).double().detach(), expert.centroid.double(), x.double()
    offset = y.sum(-1) - (mu * wide).sum(-1)
    assert expert.centroid.dtype == torch.bfloat16
    torch.testing.assert_close(expert.offset.double(), offset, atol=1e-4, rtol=0)
    radius = mu.square().sum(-1) + 2 * offset
    torch.testing.assert_close(expert.radius.double(), radius, atol=1e-4, rtol=0)
    aligned = torch.nn.functional.cosine_similarity(mu, wide)
    torch.testing.assert_close(expert.alignment.double(), aligned, atol=1e-6, rtol=0)


def test_a_standard_error_has_a_gradient_where_nothing_varies() -> None:
    """As within a region of a ReLU network; else one such coordinate would spoil all weights."""
    torch.manual_seed(0)
    fn = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        fn[0].weight[:, 1] = 0
    x = torch.randn(2, 3, dtype=torch.float64)
    local = lch.local_centroid(fn, x, radius=0.5, n_samples=4, statistics=True, create_graph=True)
    assert not local.standard_error[:, 1].any()
    local.standard_error.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in fn.parameters() if p.grad is not None)
    assert bool(fn[0].weight.grad[:, 0].any())


def test_local_centroids_in_half_precision_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centroids, "MAX_ROWS", 1)  # A sample a chunk.
    fn, x = nn.Linear(16, 3).bfloat16(), torch.randn(2, 16).bfloat16()
    local = lch.local_centroid(fn, x, radius=0.1, n_samples=600)
    assert local.dtype == torch.bfloat16
    torch.testing.assert_close(local, lch.centroid(fn, x), rtol=0.02, atol=0.02)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    n_samples=st.integers(2, 12),
    max_rows=st.integers(1, 20),
    neighbourhood=st.sampled_from(["ball", "gaussian"]),
    centre=st.booleans(),
)
def test_statistics_are_those_of_the_samples_whatever_the_chunks(
    seed: int, rows: int, n_samples: int, max_rows: int, neighbourhood: str, centre: bool
) -> None:
    torch.manual_seed(seed)
    fn, x = _network(), torch.randn(rows, 5, dtype=torch.float64)
    v = torch.randn(4, dtype=torch.float64)
    options = {"radius": 0.5, "neighbourhood": neighbourhood}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centroids, "MAX_ROWS", max_rows)
        local, plain = (
            lch.local_centroid(
                fn,
                x,
                n_samples=n_samples,
                cotangent=v,
                generator=torch.Generator().manual_seed(seed),
                statistics=statistics,
                centre=centre,
                **options,
            )
            for statistics in (True, False)
        )
    assert isinstance(local, LocalCentroid)
    assert torch.equal(local.mean, plain)
    again, chunk = torch.Generator().manual_seed(seed), max(1, max_rows // rows)
    samples = torch.cat(
        [
            lch.sample_neighbourhood(
                x,
                n_samples=min(chunk, n_samples - start),
                centre=centre and start == 0,  # Once, whatever the chunks.
                generator=again,
                **options,
            )
            for start in range(0, n_samples, chunk)
        ]
    )
    mu = lch.centroid(fn, samples, v)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(local.mean, mu.mean(0), **tight)
    torch.testing.assert_close(local.variance, mu.var(0), **tight)
    torch.testing.assert_close(local.standard_error, mu.std(0) / n_samples**0.5, **tight)


@pytest.mark.parametrize("max_rows", [1, 7, 4096])
def test_variance_in_float32_survives_a_large_mean(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The centroid of this fn at x is 4096 + x: a sum of squares in float32 would leave noise.
    monkeypatch.setattr(centroids, "MAX_ROWS", max_rows)
    seen: list[torch.Tensor] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        seen.append(4096 + x.detach())
        return 4096 * x + x.square() / 2

    x = torch.zeros(1, 3)
    generator = torch.Generator().manual_seed(0)
    local = lch.local_centroid(
        fn, x, radius=0.5, n_samples=500, generator=generator, statistics=True
    )
    expected = torch.cat(seen).double().var(0)
    torch.testing.assert_close(local.variance.double(), expected, rtol=1e-5, atol=0)


def test_standard_error_shrinks_with_the_root_of_the_samples_and_covers_the_mean() -> None:
    torch.manual_seed(0)
    fn, x = _network(), torch.randn(4, 5, dtype=torch.float64)
    few, many = (
        lch.local_centroid(
            fn,
            x,
            radius=1.0,
            n_samples=n,
            generator=torch.Generator().manual_seed(n),
            statistics=True,
        )
        for n in (500, 50_000)
    )
    ratio = few.standard_error / many.standard_error
    torch.testing.assert_close(ratio, torch.full_like(ratio, 10), rtol=0.2, atol=0)
    # As good as the mean over the whole neighbourhood, next to the error of the few.
    z = (few.mean - many.mean) / few.standard_error
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean() < 2


def test_no_neighbourhood_has_no_variance() -> None:
    torch.manual_seed(0)
    fn, x = _network(), torch.randn(3, 5, dtype=torch.float64)
    local = lch.local_centroid(fn, x, radius=0.0, n_samples=5, statistics=True)
    torch.testing.assert_close(local.mean, lch.centroid(fn, x))
    # Up to the rounding by which a matrix product may differ from row to row.
    assert local.variance.max() < 1e-30
    assert local.standard_error.max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_half_precision_are_kept_in_float32(dtype: torch.dtype) -> None:
    # Sampled centroids x / 1024 have variances near 1e-8, zero in float16.
    x = torch.zeros(2, 4, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    local = lch.local_centroid(
        lambda x: x.square() / 2048,
        x,
        radius=0.2,
        n_samples=2000,
        generator=generator,
        statistics=True,
        neighbourhood="gaussian",
    )
    assert local.mean.dtype == dtype
    assert local.variance.dtype == local.standard_error.dtype == torch.float32
    expected = torch.full_like(local.variance, (0.1 / 1024) ** 2)
    torch.testing.assert_close(local.variance, expected, rtol=0.15, atol=0)


@pytest.mark.parametrize("neighbourhood", ["ball", "gaussian"])
def test_a_generator_is_the_only_source_of_randomness(neighbourhood: str) -> None:
    fn, x = _network(), torch.randn(2, 5, dtype=torch.float64)
    before = torch.get_rng_state()
    for statistics in (False, True):
        lch.local_centroid(
            fn,
            x,
            radius=0.1,
            n_samples=3,
            neighbourhood=neighbourhood,
            generator=torch.Generator().manual_seed(0),
            statistics=statistics,
        )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused_with_the_reason() -> None:
    fn, x = _network(), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(lch.InputError, match="int64"):
        lch.centroid(fn, torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(lch.InputError, match="does not broadcast"):
        lch.centroid(fn, x, torch.ones(3))
    for bad_cotangent in (torch.zeros(4), torch.full((4,), float("nan"))):
        with pytest.raises(lch.InputError, match="finite and not all zeros"):
            lch.centroid(fn, x, bad_cotangent)
    for bad_x in (torch.ones(2, 5, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(lch.InputError, match="x has shape"):
            lch.local_centroid(fn, bad_x, radius=0.1, n_samples=2)
    with pytest.raises(lch.InputError, match="tuple"):
        lch.centroid(lambda x: (x, x), x)
    with pytest.raises(lch.NotDifferentiableError):
        lch.centroid(lambda x: x.argmax(-1).double(), x)
    with pytest.raises(lch.NotDifferentiableError):
        lch.centroid(lambda x: torch.ones(2, requires_grad=True), x)
    with pytest.raises(lch.InputError, match="one output row"):
        lch.affine_expert(lambda x: x.sum(0), x)
    for bad in ({"radius": -1.0}, {"radius": float("nan")}, {"n_samples": 0}):
        with pytest.raises(lch.InputError, match=next(iter(bad))):
            lch.local_centroid(fn, x, **{"radius": 0.1, "n_samples": 2, **bad})
    sigma = torch.ones(3)
    for bad, match in [
        ({}, "radius=None and sigma=None: .* has the one or the other"),
        ({"radius": 0.1, "sigma": 0.1, "neighbourhood": "gaussian"}, "radius=0.1 and sigma=0.1"),
        ({"sigma": 0.1}, r"sigma=0\.1 is of Gaussian noise, which neighbourhood='ball' has not"),
        ({"sigma": -0.1, "neighbourhood": "gaussian"}, r"sigma=-0\.1 must be a finite number"),
        (
            {"sigma": -sigma, "neighbourhood": "gaussian"},
            r"sigma=tensor\(.*must be a finite number",
        ),
        ({"sigma": sigma / 0, "neighbourhood": "gaussian"}, "must be a finite number"),
        ({"sigma": sigma, "neighbourhood": "gaussian"}, r"sigma has shape \(3,\) and x \(2, 5\)"),
        ({"sigma": torch.ones(4, 2, 5), "neighbourhood": "gaussian"}, r"sigma has shape \(4, 2, 5"),
    ]:
        for draw in (lch.sample_neighbourhood, partial(lch.local_centroid, fn)):
            with pytest.raises(lch.InputError, match=match):
                draw(x, n_samples=2, **bad)
    with pytest.raises(lch.InputError, match="cube"):
        lch.local_centroid(fn, x, radius=0.1, n_samples=2, neighbourhood="cube")
    with pytest.raises(lch.InputError, match="n_samples=1 has no variance"):
        lch.local_centroid(fn, x, radius=0.1, n_samples=1, statistics=True)
