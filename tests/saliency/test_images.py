"""Saliency maps of images are local centroids over the whole image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lch_plugin as lch
from lch_plugin.saliency import images
from lch_plugin.saliency.image_maps import Neighbourhood

F64 = torch.float64


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 5))
    return nn.Sequential(*layers).to(F64)


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.rand(3, 2, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("module", "depth"), [(None, 4), ("0", 1), ("1", 2)])
def test_without_noise_it_is_the_gradient_of_the_sum(
    net: nn.Sequential, batch: torch.Tensor, module: str | None, depth: int
) -> None:
    x = batch.clone().requires_grad_()
    (truth,) = torch.autograd.grad(net[:depth](x).sum(), x)
    found = images(net, batch, module=module, sigma=0.0, n_samples=2)
    assert torch.allclose(found.centroids, truth)
    assert not any(m._forward_hooks for m in net.modules())


def test_noise_is_in_units_of_the_range_of_the_image(
    net: nn.Sequential, batch: torch.Tensor
) -> None:
    image = batch[0]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, image.numel(), dtype=F64, generator=generator)
    points = image + (0.3 * (image.max() - image.min()) * noise).view(5, *image.shape)
    points.requires_grad_()
    (truth,) = torch.autograd.grad(net(points).sum(), points)
    found = images(net, batch[:1], sigma=0.3, n_samples=5)
    assert torch.allclose(found.centroids[0], truth.mean(0))


def test_a_ball_is_of_the_whole_image_in_units_of_its_range(
    net: nn.Sequential, batch: torch.Tensor
) -> None:
    image = batch[0]
    points = lch.sample_neighbourhood(
        image.flatten(),
        radius=3 * float(image.max() - image.min()),
        n_samples=5,
        generator=torch.Generator().manual_seed(0),
    )
    points = points.view(5, *image.shape).requires_grad_()
    (truth,) = torch.autograd.grad(net(points).sum(), points)
    found = images(net, batch[:1], radius=3.0, n_samples=5)
    assert torch.allclose(found.centroids[0], truth.mean(0))


def test_the_deviation_of_a_neighbourhood_is_that_of_its_points(batch: torch.Tensor) -> None:
    for settings in ({"sigma": 0.3}, {"radius": 2.0}):
        around = Neighbourhood(**settings)
        points = lch.sample_neighbourhood(
            batch[0].flatten(),
            **around.around(batch[0]),
            n_samples=20_000,
            generator=torch.Generator().manual_seed(0),
        )
        assert around.deviation(batch[0]) == pytest.approx(float(points.std(0).mean()), rel=0.01)


def test_images_and_samples_run_together_as_one_by_one(
    net: nn.Sequential, batch: torch.Tensor
) -> None:
    together = images(net, batch, n_samples=5, chunk=16)
    for i in range(len(batch)):
        alone = images(net, batch[i : i + 1], n_samples=5, chunk=2)
        assert torch.allclose(together.maps[i], alone.maps[0])


def test_a_cotangent_chooses_a_class(net: nn.Sequential, batch: torch.Tensor) -> None:
    x = batch.clone().requires_grad_()
    (truth,) = torch.autograd.grad(net(x)[:, 2].sum(), x)
    chosen = torch.eye(5, dtype=F64)[2]
    found = images(net, batch, cotangent=chosen, sigma=0.0, n_samples=1)
    assert torch.allclose(found.centroids, truth)


def test_maps_are_clipped_at_the_percentile(net: nn.Sequential, batch: torch.Tensor) -> None:
    low, high = (images(net, batch, n_samples=2, percentile=p).maps for p in (50.0, 100.0))
    assert float(low.max()) == float(high.max()) == 1.0
    assert (low == 1).sum() >= 3 * 17
    assert (high == 1).sum() == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[0], "shape"),
        (lambda x: torch.full_like(x, math.nan), "not finite"),
        (lambda x: torch.ones_like(x), "constant"),
        (lambda x: 255 * x, "normalise it"),
    ],
)
def test_bad_images_are_refused(
    net: nn.Sequential, batch: torch.Tensor, change: Any, said: str
) -> None:
    with pytest.raises((lch.InputError, TypeError) if said == "shape" else lch.InputError):
        images(net, change(batch))


@pytest.mark.parametrize(
    "setting",
    [
        {"sigma": -1.0},
        {"radius": math.nan},
        {"sigma": 0.1, "radius": 0.1},
        {"percentile": 0.0},
        {"chunk": 0},
    ],
)
def test_settings_out_of_range_are_refused(
    net: nn.Sequential, batch: torch.Tensor, setting: Any
) -> None:
    with pytest.raises(lch.InputError):
        images(net, batch, **setting)


def test_an_unknown_module_is_refused(net: nn.Sequential, batch: torch.Tensor) -> None:
    with pytest.raises(lch.SiteError, match="no module"):
        images(net, batch, module="nowhere")


def test_a_huggingface_model_of_images_has_maps() -> None:
    model = lch.load_demo_vision_model(dtype=F64)
    image = torch.rand(1, 1, 32, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = image.clone().requires_grad_()
    (truth,) = torch.autograd.grad(model(x).last_hidden_state.sum(), x)
    assert torch.allclose(images(model, image, sigma=0.0, n_samples=1).centroids, truth)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm2d(2)])
def test_a_model_in_training_mode_is_refused(batch: torch.Tensor, layer: nn.Module) -> None:
    model = nn.Sequential(layer.to(F64), nn.Flatten(), nn.Linear(72, 5).to(F64))
    with pytest.raises(lch.InputError, match="training mode"):
        images(model, batch)
    images(model.eval(), batch, n_samples=1)
