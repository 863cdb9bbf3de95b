"""Scores of pixels: the local centroid of a class, and what Captum has beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.saliency.checks import captum_attr
from lch_plugin.saliency.classes import ClassMetric
from lch_plugin.saliency.image_maps import Neighbourhood, images

#: Every method by name, and last what knows nothing of the model.
IMAGE_METHODS = (
    "local centroid",
    "local centroid x input",
    "Saliency",
    "InputXGradient",
    "IntegratedGradients",
    "SmoothGrad",
    "random order",
)


def image_by_method(
    metric: ClassMetric,
    *,
    sigma: float | None = None,
    radius: float | None = None,
    n_samples: int = 30,
    chunk: int = 16,
    seed: int = 0,
) -> dict[str, Float[Tensor, "height width"]]:
    """Scores of the pixels by each of `IMAGE_METHODS`.

    The local centroid is the paper's: summed over channels, in absolute value. Times the input it
    has a sign. Captum's are summed over channels. IntegratedGradients goes from an image of its
    mean colour to the image in 50 steps. SmoothGrad is Captum's NoiseTunnel over Saliency, at as
    many samples and with Gaussian noise of the same standard deviation: it averages magnitudes,
    where the local centroid averages with signs.

    Args:
        metric: of a class, at an image.
        sigma, radius, n_samples, chunk, seed: as `images`.

    Raises:
        InputError: as `images`.
        ToolkitError: Captum is not installed.
    """
    attr = captum_attr()
    image = metric.image
    deviation = Neighbourhood(sigma, radius).deviation(image)
    x = image[None].clone().requires_grad_()
    local = images(
        metric,
        image[None],
        sigma=sigma,
        radius=radius,
        n_samples=n_samples,
        chunk=chunk,
        seed=seed,
    )

    def smooth() -> Tensor:
        with torch.random.fork_rng():  # Captum draws from the global generator.
            torch.manual_seed(seed)
            found: Tensor = attr.NoiseTunnel(attr.Saliency(metric)).attribute(
                x,
                nt_type="smoothgrad",
                nt_samples=n_samples,
                nt_samples_batch_size=min(chunk, n_samples),
                stdevs=deviation,
            )
        return found

    scores: tuple[Callable[[], Tensor], ...] = (
        lambda: attr.Saliency(metric).attribute(x),
        lambda: attr.InputXGradient(metric).attribute(x),
        lambda: attr.IntegratedGradients(metric).attribute(
            x,
            baselines=metric.baseline[:, None, None].expand_as(image)[None],
            n_steps=50,
            internal_batch_size=chunk,
        ),
        smooth,
    )
    draw = torch.Generator().manual_seed(seed)
    found = (
        local.centroids[0].sum(0).abs(),
        (local.centroids[0] * image).sum(0),
        *(score()[0].sum(0).detach() for score in scores),
        torch.rand(image.shape[1:], generator=draw).to(image),
    )
    return dict(zip(IMAGE_METHODS, found, strict=True))
