"""scikit-learn's handwritten digits: 32 by 32 pixels, and a split that never changes."""

from __future__ import annotations

import random

import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor

from lch_plugin.demo.tasks import check_split

IMAGE_SIZE = 32
N_CLASSES = 10
#: Of the training images' pixels, which lie in [0, 1].
MEAN, STD = 0.305, 0.324

_BRIGHTEST = 16.0
_TEST_FRACTION = 0.2
_SPLIT_SEED = 0


def digits(split: str) -> tuple[Float[Tensor, "image 1 32 32"], Int[Tensor, " image"]]:
    """The images of a split, normalised as the model reads them, and which digits they show.

    Raises:
        InputError: no such split.
    """
    images, labels = pixels(split)
    return normalise(images), labels


def pixels(split: str) -> tuple[Float[Tensor, "image 1 32 32"], Int[Tensor, " image"]]:
    """As `digits`, with the images not normalised: 0 is paper, 1 is ink.

    Raises:
        InputError: no such split.
    """
    bunch = load_digits()
    chosen = split_indices(split)
    small = torch.tensor(bunch.images, dtype=torch.float32)[chosen, None] / _BRIGHTEST
    images = torch.nn.functional.interpolate(
        small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
    )
    return images, torch.tensor(bunch.target, dtype=torch.int64)[chosen]


def normalise(images: Float[Tensor, "*image"]) -> Float[Tensor, "*image"]:
    """From ink in [0, 1] to about zero mean and unit variance."""
    return (images - MEAN) / STD


def split_indices(split: str) -> list[int]:
    """Which of the 1,797 images make up a split: a fifth of every digit is held out.

    Raises:
        InputError: no such split.
    """
    check_split(split)
    targets = load_digits().target.tolist()
    # Not scikit-learn's nor torch's generator: theirs may change from one release to the next.
    rng = random.Random(_SPLIT_SEED)
    held_out: set[int] = set()
    for digit in range(N_CLASSES):
        members = [index for index, target in enumerate(targets) if target == digit]
        held_out |= set(rng.sample(members, round(_TEST_FRACTION * len(members))))
    return [index for index in range(len(targets)) if (index in held_out) == (split == "test")]
