"""Random views of images: where a view looks, and what becomes of the ink there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from lch_plugin.errors import InputError

# One, two, one: blurring twice with it is about a Gaussian of one pixel.
_BLUR = torch.tensor([0.25, 0.5, 0.25])
_BLUR_KERNEL = (_BLUR[:, None] * _BLUR)[None, None]


@dataclass(frozen=True)
class Augmentation:
    """How views differ from the image. Never mirrored: a mirrored digit is no digit.

    Attributes:
        size: pixels on a side of a view.
        side: least and greatest side of the square that a view shows, as a fraction of the image.
        shift: how far the square may be moved beyond where it would stay on the image (or, if it
            is larger, keep the image on it), as a fraction of the image.
        rotation: degrees, either way.
        stretch: how much longer than the other one axis may be, and how far a shear may lean.
        thickness: how strongly strokes may grow or shrink, 0 to 1.
        blur: how strongly they may be smoothed, 0 to 1.
        contrast: how far the factor on the ink may be from 1.
        brightness: how far the offset may be from 0.
        noise: the greatest standard deviation of Gaussian noise.

    Raises:
        InputError: a range that no view can have.
    """

    size: int
    side: tuple[float, float]
    shift: float = 0.03
    rotation: float = 8.0
    stretch: float = 0.15
    thickness: float = 0.4
    blur: float = 1.0
    contrast: float = 0.2
    brightness: float = 0.05
    noise: float = 0.05

    def __post_init__(self) -> None:
        least, greatest = self.side
        if self.size < 1 or not 0 < least <= greatest:
            raise InputError(
                f"Views of {self.size} pixels with sides in {self.side} cannot be made. "
                "Take at least one pixel and 0 < least <= greatest."
            )
        where = (self.shift, self.rotation, self.stretch)
        ink = (self.thickness, self.blur, self.contrast, self.brightness, self.noise)
        if min(*where, *ink) < 0 or max(self.thickness, self.blur) > 1:
            raise InputError(
                f"{self} asks for a negative amount, or for a thickness or blur above 1. "
                "Choose amounts of at least 0, and those two of at most 1."
            )


def augment(
    images: Float[Tensor, "image 1 height width"],
    augmentation: Augmentation,
    generator: Generator,
) -> Float[Tensor, "image 1 size size"]:
    """One random view of each image. Ink stays in [0, 1]; beyond the image is paper.

    The generator decides everything.
    """
    views = _look(images, augmentation, generator)
    views = _change_strokes(views, augmentation, generator)
    return _change_ink(views, augmentation, generator)


def _look(
    images: Float[Tensor, "image 1 height width"],
    augmentation: Augmentation,
    generator: Generator,
) -> Float[Tensor, "image 1 size size"]:
    n, a = len(images), augmentation
    least, greatest = a.side
    side = least + (greatest - least) * torch.rand(n, generator=generator)
    angle = torch.deg2rad(a.rotation * _symmetric(n, generator))
    aspect = torch.exp(a.stretch / 2 * _symmetric(n, generator))
    shear = a.stretch * _symmetric(n, generator)
    # The grid's unit is half an image, so a fraction of the image counts twice.
    room = (1 - side).abs() + 2 * a.shift
    centre = room[:, None] * _symmetric(2 * n, generator).view(n, 2)
    rotation = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)],
        dim=-2,
    )
    zero = torch.zeros(n)
    scale = torch.stack(
        [torch.stack([side * aspect, shear * side], -1), torch.stack([zero, side / aspect], -1)],
        dim=-2,
    )
    affine = torch.cat([rotation @ scale, centre[:, :, None]], dim=-1)
    grid = F.affine_grid(affine, [n, 1, a.size, a.size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _change_strokes(
    views: Float[Tensor, "image 1 size size"], augmentation: Augmentation, generator: Generator
) -> Float[Tensor, "image 1 size size"]:
    """Mix every view with one whose strokes are thicker or thinner, then with a smoothed one."""
    n = len(views)
    weight = augmentation.thickness * _symmetric(n, generator).view(n, 1, 1, 1)
    thicker = F.max_pool2d(views, 3, stride=1, padding=1)
    thinner = -F.max_pool2d(-views, 3, stride=1, padding=1)
    views = views + weight.abs() * (torch.where(weight > 0, thicker, thinner) - views)
    smooth = views
    for _ in range(2):
        smooth = F.conv2d(smooth, _BLUR_KERNEL, padding=1)
    weight = augmentation.blur * torch.rand(n, generator=generator).view(n, 1, 1, 1)
    return views + weight * (smooth - views)


def _change_ink(
    views: Float[Tensor, "image 1 size size"], augmentation: Augmentation, generator: Generator
) -> Float[Tensor, "image 1 size size"]:
    n, a = len(views), augmentation
    contrast = 1 + a.contrast * _symmetric(n, generator).view(n, 1, 1, 1)
    brightness = a.brightness * _symmetric(n, generator).view(n, 1, 1, 1)
    noise = a.noise * torch.rand(n, generator=generator).view(n, 1, 1, 1)
    grain = torch.randn(views.shape, generator=generator)
    return (contrast * views + brightness + noise * grain).clamp(0, 1)


def _symmetric(n: int, generator: Generator) -> Float[Tensor, " {n}"]:
    """Uniform in [-1, 1)."""
    return 2 * torch.rand(n, generator=generator) - 1
