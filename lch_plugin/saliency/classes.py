"""The metric of a class, as a plain function of images."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.arguments import output_of
from lch_plugin.errors import InputError
from lch_plugin.loading import LoadedModel
from lch_plugin.mlp import at_least_float32
from lch_plugin.saliency.checks import check_evaluation
from lch_plugin.saliency.image_maps import check_images
from lch_plugin.saliency.judging import Curves, curves


class ClassMetric:
    """Log-probability of a class, in nats, from images.

    Logits are taken to float32 first if the model has them in half precision.

    Attributes:
        image: ``(channel, height, width)``.
        baseline: mean of each channel over the image, ``(channel,)``: what a removed pixel becomes.
        target: the class.
        label: its name in the model's config, or its number.
        predicted: the most probable class.

    Args:
        model: from `lch_plugin.load`, or anything that is called with images and returns logits
            ``(batch, class)`` or has them as ``.logits``.
        image: as the model takes it, normalised.
        target: a class; the predicted one if None.

    Raises:
        InputError: an image or a model of another kind, a model in training mode, or no such class.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> metric = lch.saliency.ClassMetric(net, torch.rand(1, 8, 8), target=2)
        >>> metric(metric.image[None]).shape
        torch.Size([1])
    """

    def __init__(
        self, model: Any, image: Float[Tensor, "channel height width"], target: int | None = None
    ) -> None:
        self._model = model.model if isinstance(model, LoadedModel) else model
        check_images(image[None])
        check_evaluation(self._model)
        self.image = self._as_model_takes_it(image)
        self.baseline = self.image.mean((1, 2))
        with torch.no_grad():
            logits = self._logits(self.image[None])
        self.predicted = int(logits[0].argmax())
        self.target = self.predicted if target is None else target
        if not 0 <= self.target < logits.shape[1]:
            raise InputError(
                f"target={target}: the model has classes 0 to {logits.shape[1] - 1}. Give one."
            )
        self.label = self.name(self.target)

    def __call__(self, x: Float[Tensor, "n channel height width"]) -> Float[Tensor, " n"]:
        """The metric at images."""
        # Captum's noise is float32, whatever the model is.
        return self._logits(x.to(self.image)).log_softmax(-1)[:, self.target]

    def name(self, target: int) -> str:
        """The name of a class in the model's config, or its number."""
        names = getattr(getattr(self._model, "config", None), "id2label", None) or {}
        return str(names.get(target, target))

    def _logits(self, x: Tensor) -> Tensor:
        try:
            logits = output_of(self._model(x), "the model")
        except ValueError as error:  # transformers' own check of an image's shape.
            raise InputError(
                f"the model does not take an image of shape {tuple(x.shape[1:])}: {error}"
            ) from error
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise InputError(
                f"the model gives {tuple(logits.shape)} for a batch of {len(x)}, no logits "
                "(batch, class): give a model for image classification."
            )
        return logits.to(at_least_float32(logits))

    def _as_model_takes_it(self, image: Tensor) -> Tensor:
        config = getattr(self._model, "config", None)
        n_channels = getattr(config, "num_channels", len(image))
        if n_channels != len(image):
            raise InputError(
                f"an image of shape {tuple(image.shape)}: the model takes {n_channels} channels."
            )
        parameters = getattr(self._model, "parameters", lambda: iter(()))
        weight = next(iter(parameters()), image)
        return image.detach().to(weight.device, weight.dtype)


def image_curves(
    metric: ClassMetric, scores: Float[Tensor, "height width"], *, steps: int = 32, chunk: int = 32
) -> Curves:
    """Deletion and insertion of pixels, in the order of a map: `curves` of an image.

    A pixel that is removed has the mean colour of the image.

    Args:
        metric: of a class, at an image.
        scores: one a pixel.
        steps, chunk: as `curves`.

    Raises:
        InputError: as `curves`.
    """
    size = metric.image.shape[1:]
    return curves(
        lambda rows: metric(rows.transpose(1, 2).unflatten(2, size)),
        metric.image.flatten(1).T,
        scores.flatten(),
        metric.baseline,
        steps=steps,
        chunk=chunk,
    )
