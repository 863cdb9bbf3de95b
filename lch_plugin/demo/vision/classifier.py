"""The demo vision model with a head that names digits, and pictures as it reads them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification

from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR, load_demo_vision_model
from lch_plugin.demo.vision.images import IMAGE_SIZE, N_CLASSES, digits, normalise
from lch_plugin.loading import LoadedModel


def load_demo_classifier(
    *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> LoadedModel:
    """The demo vision model, and a linear head on its CLS token and mean patch.

    The head is scikit-learn's logistic regression on the training digits, fitted here in a few
    seconds: the model itself was trained without labels. It tells 98.9 % of the held-out digits.

    Args:
        device: where to put the model.
        dtype: as `lch_plugin.load` has it; float32 if None.

    Example:
        >>> from lch_plugin.demo.vision import digits
        >>> from lch_plugin.demo.vision.classifier import load_demo_classifier
        >>> images, labels = digits("test")
        >>> logits = load_demo_classifier().model(images[:4]).logits
        >>> (logits.argmax(-1) == labels[:4]).tolist()
        [True, True, True, True]
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    model = _without_head()
    with torch.no_grad():
        for own, fitted in zip(model.classifier.parameters(), _head(), strict=True):
            own.copy_(fitted)
    model = model.to(device, dtype or torch.float32)
    return LoadedModel(model, as_pixels, str(DEMO_VISION_MODEL_DIR), DEMO_VISION_MODEL_DIR, None)


def as_pixels(picture: Image.Image, **_as_processors_take: str) -> dict[str, Tensor]:
    """A picture as the model reads digits: in grey, 32 by 32, bright ink on a dark ground.

    In place of an image processor of transformers, and called as one.
    """
    small = picture.convert("L").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
    return {"pixel_values": normalise(pixels[None, None])}


def _without_head() -> Dinov2ForImageClassification:
    body = load_demo_vision_model()
    names = {i: str(i) for i in range(N_CLASSES)}
    ids = {name: i for i, name in names.items()}
    config = Dinov2Config(**{**body.config.to_dict(), "id2label": names, "label2id": ids})
    model = Dinov2ForImageClassification(config).eval()
    model.dinov2.load_state_dict(body.state_dict())
    return model


@cache
def _head() -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    model, read = _without_head(), list[Tensor]()
    images, labels = digits("train")
    model.classifier.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        for batch in images.split(256):
            model(batch)
    fitted = LogisticRegression(max_iter=2000).fit(torch.cat(read).numpy(), labels.numpy())
    return torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
