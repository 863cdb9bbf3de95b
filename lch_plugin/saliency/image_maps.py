"""Saliency maps: local centroids from an image to any module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.arguments import output_of
from lch_plugin.adapters.checks import check_finite
from lch_plugin.centroids import centroid, mean_over_neighbourhood
from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import at_least_float32
from lch_plugin.saliency.checks import check_evaluation

#: The paper's, of the image's range.
SIGMA = 0.15
# Normalised images stay within a few units of 0, whatever the normalisation; bytes do not.
_LARGEST = 50.0


@dataclass(frozen=True)
class ImageMaps:
    """Local centroids of images.

    Attributes:
        centroids: in the shape of the images.
        maps: summed over channels, in absolute value, clipped at a percentile and scaled to 0..1.
    """

    centroids: Float[Tensor, "batch channel height width"]
    maps: Float[Tensor, "batch height width"]


def images(
    model: Callable[[Tensor], Any],
    batch: Float[Tensor, "batch channel height width"],
    *,
    module: str | None = None,
    cotangent: Float[Tensor, ...] | None = None,
    sigma: float | None = None,
    radius: float | None = None,
    n_samples: int = 30,
    percentile: float = 99.0,
    chunk: int = 16,
    seed: int = 0,
) -> ImageMaps:
    """Local centroids of a module's output in the pixels of each image.

    The neighbourhood is of the whole image. Every image has its own draw of the same seed, so that
    its map is the same in any batch.

    Args:
        model: called with images; anything with ``.logits`` is read there. An ``nn.Module``, or a
            function of images such as a `ClassMetric`.
        batch: images as the model takes them, normalised.
        module: name of an inner module whose output is the component's; the model's own if None.
        cotangent: ``v``, broadcast to that output; all ones if None.
        sigma: of Gaussian noise in each coordinate, in units of the image's range (largest less
            smallest value). The paper's 0.15 if there is no radius.
        radius: of a ball in place of Gaussian noise, in units of the image's range. Noise of
            ``sigma`` is about as far from the image of ``d`` coordinates as
            ``radius = sigma * sqrt(d)``.
        n_samples: points around each image; the default is the paper's.
        percentile: of each map, at which it is clipped.
        chunk: samples that run together.
        seed: of the noise.

    Raises:
        InputError: images of another shape, not finite, constant or not normalised; settings out of
            range, sigma and radius both given; or a model in training mode.
        SiteError: there is no such module, or it was not called.
        NonFiniteError: the model overflows.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU())
        >>> lch.saliency.images(net, torch.rand(2, 3, 8, 8), module="0", n_samples=4).maps.shape
        torch.Size([2, 8, 8])
    """
    check_images(batch)
    check_evaluation(model)
    neighbourhood = Neighbourhood(sigma, radius)
    if not 0 < percentile <= 100 or chunk < 1:
        raise InputError(
            f"percentile={percentile}, chunk={chunk}: give one above 0 up to 100, and at least 1."
        )
    found = []
    with _reading(model, module) as read:
        for image in batch:

            def mu(samples: Tensor, shape: torch.Size = image.shape) -> Tensor:
                parts = samples.split(chunk)
                return torch.cat(
                    [centroid(lambda x: read(x.unflatten(-1, shape)), p, cotangent) for p in parts]
                )

            local = mean_over_neighbourhood(
                mu,
                image.flatten(),
                **neighbourhood.around(image),
                n_samples=n_samples,
                generator=torch.Generator(image.device).manual_seed(seed),
            )
            found.append(local.mean.view_as(image))
    centroids = torch.stack(found)
    check_finite("the local centroid of an image", centroids)
    return ImageMaps(centroids, clipped(centroids.sum(1).abs(), percentile))


def clipped(
    maps: Float[Tensor, "batch height width"], percentile: float
) -> Float[Tensor, "batch height width"]:
    """Maps in units of a percentile of their magnitudes, within -1..1."""
    wide = maps.flatten(1).abs().to(at_least_float32(maps))
    top = wide.quantile(percentile / 100, dim=1).to(maps)[:, None, None]
    return (maps / top.clamp_min(torch.finfo(maps.dtype).tiny)).clamp(-1, 1)


@dataclass(frozen=True)
class Neighbourhood:
    """Of an image, in units of its range: Gaussian noise, or a ball.

    Attributes:
        sigma, radius: as `images`.

    Raises:
        InputError: both are given, or one is negative or not finite.
    """

    sigma: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.sigma is not None and self.radius is not None:
            raise InputError(
                f"sigma={self.sigma} is of Gaussian noise and radius={self.radius} of a ball: give "
                "one of them."
            )
        if self.sigma is None and self.radius is None:
            object.__setattr__(self, "sigma", SIGMA)
        name, value = ("sigma", self.sigma) if self.radius is None else ("radius", self.radius)
        if value is None or not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name}={value} has to be a number from 0: give one, such as 0.15.")

    def around(self, image: Tensor) -> dict[str, Any]:
        """For `lch_plugin.sample_neighbourhood`, of the flattened image."""
        size = float(image.max() - image.min())
        if self.radius is not None:
            return {"neighbourhood": "ball", "radius": self.radius * size}
        assert self.sigma is not None  # It is the one or the other.
        return {"neighbourhood": "gaussian", "sigma": self.sigma * size}

    def deviation(self, image: Tensor) -> float:
        """Standard deviation of its points in each coordinate."""
        around = self.around(image)
        if self.radius is not None:
            return float(around["radius"]) / math.sqrt(image.numel() + 2)
        return float(around["sigma"])

    def __str__(self) -> str:
        if self.radius is not None:
            return f"ball of radius {self.radius:g} of the image's range"
        return f"Gaussian, sigma {self.sigma:g} of the image's range"


def check_images(batch: Tensor) -> None:
    """Refuse what is no batch of images as a model takes them.

    Raises:
        InputError: another shape or dtype, values that are not finite or not normalised, or an
            image of one value.
    """
    if batch.ndim != 4 or 0 in batch.shape or not batch.is_floating_point():
        raise InputError(
            f"images of shape {tuple(batch.shape)}, {batch.dtype}: give floating point "
            "(batch, channel, height, width), as the model takes it."
        )
    rows = batch.flatten(1)
    if not bool(rows.isfinite().all()):
        raise InputError("an image has values that are not finite: look at its normalisation.")
    if float(rows.abs().max()) > _LARGEST:
        raise InputError(
            f"an image has values up to {float(rows.abs().max()):g}: normalise it as the model's "
            "image processor does. If the model itself takes 0 to 255, wrap it so that it "
            "multiplies by 255."
        )
    if bool((rows.amax(1) == rows.amin(1)).any()):
        raise InputError(
            "an image is constant: its range, the unit of the neighbourhood, is zero. Leave it out."
        )


class _Reached(Exception):
    """The module's output is known; the rest of the model need not run."""


@contextmanager
def _reading(model: Callable[[Tensor], Any], name: str | None) -> Iterator[Any]:
    """A function from images to a module's output."""
    if name is None:
        yield lambda x: output_of(model(x), "the model")
        return
    module = dict(model.named_modules()).get(name) if isinstance(model, nn.Module) else None
    if module is None:
        raise SiteError(f"there is no module {name!r}: see model.named_modules().")
    outputs: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Reached

    def read(x: Tensor) -> Tensor:
        outputs.clear()
        try:
            model(x)
        except _Reached:
            return output_of(outputs[0], f"module {name!r}")
        raise SiteError(f"the module {name!r} was not called.")

    hook = module.register_forward_hook(keep)
    try:
        yield read
    finally:
        hook.remove()
