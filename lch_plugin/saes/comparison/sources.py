"""Labelled data sets, wherever they are kept."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from sklearn.model_selection import GroupShuffleSplit

from lch_plugin.errors import InputError
from lch_plugin.names import did_you_mean
from lch_plugin.saes.comparison.data import Labelled
from lch_plugin.saes.sources.texts import check_inputs, load_text

# Of a data set that is not split, what is held out.
_TEST_FRACTION = 0.2
# Written by `save_to_disk`; a directory without them may hold folders of images.
_SAVED = ("dataset_info.json", "dataset_dict.json")


def load_labelled(
    source: str | Path | Dataset,
    label: str,
    *,
    column: str | None = None,
    split: str = "train",
    test_split: str | None = None,
    seed: int = 0,
    skip_empty: bool = False,
) -> tuple[Labelled, Labelled]:
    """Load labelled texts or images, shuffled, to train on and held out.

    A column of lists of words is joined by spaces, and a list of labels beside it has one a word.

    No text or image is in both. Of a ``test_split`` those are left out that ``split`` has too, and
    `Labelled.left_out` says how many. Where a fifth is held out, rows with the same text or image
    are on one side, whatever their labels. `Labelled.contents` says which are the same.

    Args:
        source: what `lch_plugin.saes.load_text` takes, other than lists of texts; or a
            directory with a folder of images for each label.
        label: column of labels.
        column: of texts or images; ``image`` if there is one, else ``text``.
        split: to train on.
        test_split: held out, of a source with several splits; if None, a fifth of the different
            texts or images of ``split``, chosen at random.
        seed: of the order and of that choice.
        skip_empty: leave out rows without a text or image; a warning says how many. A row without
            a label stays, and counts for none.

    Raises:
        InputError: the data set cannot be read, has no such split or column, a row without a text
            or image, no label, or nothing to hold out that is not also in the other part.
    """
    name = f"{source}, {label}" if isinstance(source, str | Path) else label

    def load(split: str, name: str) -> Labelled:
        data, read = _load(source, split, label, column, skip_empty)
        return _labelled(data.shuffle(seed=seed), label, read, name)

    data = load(split, f"{name} ({split})")
    if test_split is not None:
        held_out_name = f"{name} ({test_split}, held out)"
        return data, load(test_split, held_out_name).without(data)
    numbers: dict[Hashable, int] = {}
    of_row = [numbers.setdefault(content, len(numbers)) for content in data.contents()]
    if len(numbers) < 2:
        raise InputError(
            f"{name} has {len(of_row)} rows with {len(numbers)} different inputs, of which none "
            "can be held out. Give two or more."
        )
    splitter = GroupShuffleSplit(n_splits=1, test_size=_TEST_FRACTION, random_state=seed)
    parts = next(splitter.split(of_row, groups=of_row))
    train, test = (data.select(rows.tolist()) for rows in parts)
    held_out_name = f"{_TEST_FRACTION:.0%} of {split}, held out"
    if n_repeated := len(of_row) - len(numbers):
        held_out_name += f"; of all, {n_repeated:,} repeat another and are on its side"
    return train, replace(test, name=f"{name} ({held_out_name})")


def _load(
    source: str | Path | Dataset, split: str, label: str, column: str | None, skip_empty: bool
) -> tuple[Dataset, str]:
    """A split, and which column of it is read."""
    data = _read(source, split)
    if not len(data):
        raise InputError(f"{split!r} of {source} has no rows. Give a split with some.")
    column = column or ("image" if "image" in data.column_names else "text")
    for wanted in (label, column):
        if wanted not in data.column_names:
            raise InputError(
                f"the data set has no column {wanted!r}. {did_you_mean(wanted, data.column_names)}"
            )
    if data.data.column(label).null_count == len(data.data):
        raise InputError(f"column {label!r} labels no row: all of it is missing. Name another.")
    return check_inputs(data, column, skip_empty), column


def _read(source: str | Path | Dataset, split: str) -> Dataset:
    if isinstance(source, str | Path) and Path(source).expanduser().is_dir():
        path = Path(source).expanduser()
        if not any((path / name).exists() for name in _SAVED):
            try:
                return datasets.load_dataset(str(path), split=split)
            except Exception as error:  # Of any type, and all of them about the files.
                raise InputError(f"{path} cannot be read as a data set: {error}") from error
    data = load_text(source, split=split)
    if isinstance(data, IterableDataset):
        raise InputError("a streamed data set has no split to hold out: pass one in memory.")
    return data


def _labelled(data: Dataset, label: str, column: str, name: str) -> Labelled:
    feature = data.features[label]
    labels = list(data[label])
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names:
        labels = [_named(entry, names) for entry in labels]
    first = data[0][column]
    if isinstance(first, str):
        return Labelled(list(data[column]), {label: labels}, name)
    if isinstance(first, list):
        pairs = [_join(*pair) for pair in zip(data[column], labels, strict=True)]
        return Labelled([text for text, _ in pairs], {label: [entry for _, entry in pairs]}, name)
    images = data.select_columns([column])
    if column != "image":
        images = images.rename_column(column, "image")
    return Labelled(images, {label: labels}, name)


def _named(entry: Any, names: list[str]) -> Any:
    if isinstance(entry, list):
        return [_named(each, names) for each in entry]
    return names[entry] if isinstance(entry, int) and entry >= 0 else None


def _join(words: list[str], labels: Any) -> tuple[str, Any]:
    """A text, and its labels by the characters of each word."""
    text = " ".join(words)
    if not isinstance(labels, list):
        return text, labels
    if len(labels) != len(words):
        raise InputError(f"there are {len(labels)} labels for the words {words}.")
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    return text, [
        (end - 1 - len(word), end - 1, label)
        for word, end, label in zip(words, ends, labels, strict=True)
    ]
