"""Saliency maps: local centroids from an image to any module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.arguments import output_of
from lch_plugin.centroids import centroid, mean_over_neighbourhood
from lch_plugin.errors import InputError, SiteError


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
    model: nn.Module,
    batch: Float[Tensor, "batch channel height width"],
    *,
    module: str | None = None,
    cotangent: Float[Tensor, ...] | None = None,
    sigma: float = 0.15,
    n_samples: int = 30,
    percentile: float = 99.0,
    chunk: int = 16,
    seed: int = 0,
) -> ImageMaps:
    """Local centroids of a module's output in the pixels of each image.

    Noise covers the whole image. Every image has its own draw of the same seed, so that its map is
    the same in any batch.

    Args:
        model: called with images; anything with ``.logits`` is read there.
        batch: images as the model takes them, normalised.
        module: name of an inner module whose output is the component's; the model's own if None.
        cotangent: ``v``, broadcast to that output; all ones if None.
        sigma: of Gaussian noise, in units of the image's range (largest less smallest value).
        n_samples: points around each image. The defaults of both are the paper's.
        percentile: of each map, at which it is clipped.
        chunk: samples that run together.
        seed: of the noise.

    Raises:
        InputError: images of another shape, not finite or constant, or settings out of range.
        SiteError: there is no such module, or it was not called.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU())
        >>> lch.saliency.images(net, torch.rand(2, 3, 8, 8), module="0", n_samples=4).maps.shape
        torch.Size([2, 8, 8])
    """
    _check(batch, sigma, percentile, chunk)
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
                sigma=sigma * float(image.max() - image.min()),
                neighbourhood="gaussian",
                n_samples=n_samples,
                generator=torch.Generator(image.device).manual_seed(seed),
            )
            found.append(local.mean.view_as(image))
    centroids = torch.stack(found)
    maps = centroids.sum(1).abs()
    wide = maps.flatten(1).to(torch.promote_types(maps.dtype, torch.float32))
    top = wide.quantile(percentile / 100, dim=1).to(maps)[:, None, None]
    return ImageMaps(centroids, (maps / top.clamp_min(torch.finfo(maps.dtype).tiny)).clamp(max=1))


def _check(batch: Tensor, sigma: float, percentile: float, chunk: int) -> None:
    if batch.ndim != 4 or 0 in batch.shape or not batch.is_floating_point():
        raise InputError(
            f"images of shape {tuple(batch.shape)}, {batch.dtype}: give floating point "
            "(batch, channel, height, width), as the model takes it."
        )
    rows = batch.flatten(1)
    if not bool(rows.isfinite().all()):
        raise InputError("an image has values that are not finite: look at its normalisation.")
    if bool((rows.amax(1) == rows.amin(1)).any()):
        raise InputError(
            "an image is constant: its range, the unit of sigma, is zero. Leave it out."
        )
    if not (math.isfinite(sigma) and sigma >= 0):
        raise InputError(f"sigma={sigma} has to be a number from 0: give one, such as 0.15.")
    if not 0 < percentile <= 100 or chunk < 1:
        raise InputError(
            f"percentile={percentile}, chunk={chunk}: give one above 0 up to 100, and at least 1."
        )


class _Reached(Exception):
    """The module's output is known; the rest of the model need not run."""


@contextmanager
def _reading(model: nn.Module, name: str | None) -> Iterator[Any]:
    """A function from images to a module's output."""
    if name is None:
        yield lambda x: output_of(model(x), "the model")
        return
    module = dict(model.named_modules()).get(name)
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
