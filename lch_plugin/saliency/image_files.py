"""A picture on the disk, as a model takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from lch_plugin.errors import InputError
from lch_plugin.loading import LoadedModel
from lch_plugin.records import check_plain, reason

# Of others, as 16 bits a channel, Pillow makes eight by cutting off what is brighter.
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_CURE = "Give a picture, such as a .png or .jpg."


def read_picture(path: str | Path) -> Image.Image:
    """A picture, turned as its camera says, in RGB.

    Raises:
        InputError: the file is none, has more than eight bits a channel, or is transparent.
    """
    path = Path(path).expanduser()
    check_plain(path, _CURE)
    try:
        with Image.open(path) as file:
            file.load()
            picture = ImageOps.exif_transpose(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no picture that can be read: {reason(error)}. {_CURE}") from (
            error
        )
    if picture.mode not in _EIGHT_BITS:
        raise InputError(
            f"{path} is a picture of mode {picture.mode}, not of eight bits a channel: convert it."
        )
    if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
        raise InputError(
            f"{path} is transparent in places, where a model would see what is hidden there: put "
            "it on a background."
        )
    return picture.convert("RGB")


def as_model_takes_it(
    picture: Image.Image, loaded: LoadedModel
) -> Float[Tensor, "channel height width"]:
    """A picture by the image processor of a model.

    Raises:
        InputError: the model reads no images, or has no image processor beside it.
    """
    if loaded.model.main_input_name != "pixel_values":
        raise InputError(
            f"{loaded.name} reads {loaded.model.main_input_name}, no images: give a model for "
            "image classification, or a prompt in place of the image."
        )
    if loaded.processor is None:
        raise InputError(
            f"{loaded.name} has no image processor beside it: save one there, with "
            "processor.save_pretrained."
        )
    pixels: Tensor = loaded.processor(picture, return_tensors="pt")["pixel_values"]
    return pixels[0]
