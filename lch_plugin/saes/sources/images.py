"""Batches of images as a vision model takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lch_plugin.errors import InputError


class Images:
    """Batches of ``{"pixel_values": ...}``: iterate as often as the images can be.

    Attributes:
        images: a tensor of shape ``(n, channel, height, width)``, ready for the model; a `datasets`
            dataset with a column of images, streamed or not; or anything that iterates over images
            (PIL, arrays).
        processor: the model's image processor; needed unless the images are a tensor.
        batch_size: images in a batch; the last may have fewer.
        column: of the dataset.
        seed: of the order, the same each time; as they come if None. Only for images that have a
            length.

    Raises:
        InputError: no images, no such column, no processor, or nothing to put in order.

    Example:
        >>> loaded = lch.load("facebook/dinov2-base")
        >>> images = datasets.load_dataset("frgfm/imagenette", "320px", split="train")
        >>> batches = lch.saes.Images(images, loaded.processor)
    """

    def __init__(
        self,
        images: Tensor | Dataset | IterableDataset | Iterable[Any],
        processor: Any = None,
        *,
        batch_size: int = 64,
        column: str = "image",
        seed: int | None = None,
    ) -> None:
        """Check that the images can be read; none is yet."""
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1.")
        if isinstance(images, Tensor):
            if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
                raise InputError(
                    f"images of shape {tuple(images.shape)} and dtype {images.dtype}: a tensor has "
                    "to be (n, channel, height, width), floating point and normalised."
                )
        elif not isinstance(images, Iterable):
            raise InputError(f"images is one {type(images).__name__}: pass a list of them.")
        elif processor is None or isinstance(processor, PreTrainedTokenizerBase):
            raise InputError(
                f"processor is a {type(processor).__name__}: images that are no tensor need the "
                "model's image processor. lch.load(...).processor is that of a model of images; of "
                "one that reads text as well take "
                "transformers.AutoImageProcessor.from_pretrained(...)."
            )
        if isinstance(images, DatasetDict | IterableDatasetDict):
            raise InputError(f"images has several splits, {list(images)}: pass one of them.")
        columns = getattr(images, "column_names", None)
        if isinstance(images, Dataset | IterableDataset) and columns and column not in columns:
            raise InputError(f"column={column!r} is none of the dataset's {columns}.")
        if seed is not None and not hasattr(images, "__len__"):
            raise InputError(
                f"seed={seed}: images without a length have no order to choose. Shuffle them "
                "yourself (a streamed dataset has .shuffle), and leave seed out."
            )
        self.images, self.processor, self.column = images, processor, column
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.seed is None:
            iterator = iter(self._column())
            while batch := list(itertools.islice(iterator, self.batch_size)):
                yield self._prepare(batch)
            return
        generator = torch.Generator().manual_seed(self.seed)
        images: Any = self.images
        for chosen in torch.randperm(len(images), generator=generator).split(self.batch_size):
            if isinstance(images, Tensor):
                yield self._prepare(list(images[chosen]))
            elif isinstance(images, Dataset):
                yield self._prepare(images.select(chosen.tolist())[self.column])
            else:
                yield self._prepare([images[i] for i in chosen.tolist()])

    def _column(self) -> Iterable[Any]:
        if isinstance(self.images, Dataset | IterableDataset):
            return (row[self.column] for row in self.images)
        return self.images

    def _prepare(self, batch: Any) -> dict[str, Tensor]:
        if isinstance(self.images, Tensor):
            return {"pixel_values": torch.stack(list(batch))}
        # Grey and transparent pictures are among those of most sets.
        batch = [image.convert("RGB") if hasattr(image, "convert") else image for image in batch]
        return {"pixel_values": self.processor(images=batch, return_tensors="pt")["pixel_values"]}
