"""A small DINOv2-like vision transformer, trained on digits, that ships with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Dinov2Model

from lch_plugin.demo.vision.images import digits
from lch_plugin.errors import InputError

__all__ = ["DEMO_VISION_MODEL_DIR", "digits", "load_demo_vision_model"]

DEMO_VISION_MODEL_DIR = Path(__file__).parent / "model"


def load_demo_vision_model(
    directory: str | Path = DEMO_VISION_MODEL_DIR,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dinov2Model:
    """Load the demo vision model, ready for inference, without a network.

    It reads what `digits` gives, ``(image, 1, 32, 32)``.

    Raises:
        InputError: ``directory`` holds no model.
    """
    if not (Path(directory) / "config.json").is_file():
        raise InputError(
            f"There is no vision model in {directory}. "
            "Give a directory that lch_plugin.demo.vision.train made, or none for the shipped one."
        )
    model = Dinov2Model.from_pretrained(str(directory), dtype=dtype, local_files_only=True)
    return model.to(device).eval()
